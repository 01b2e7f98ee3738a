"""Lists the rows of the suite seed25: each one's task in lmms-eval, and the seed's own figures."""

from __future__ import annotations

from dataclasses import dataclass

# The version that lmms_runner.py changes and tools/evaluate/lmms_environment.py installs.
LMMS_VERSION = "0.7.3"
ZEROBENCH = "ZeroBench(Sub)"  # the one that lmms-eval does not have


@dataclass(frozen=True)
class Benchmark:
    """A row of the suite."""

    name: str  # in the seed's table
    task: str  # in lmms-eval; empty: zerobench.py asks it
    metric: str = ""  # in lmms-eval; empty: the first of the task
    scale: float = 1.0  # factor that brings lmms-eval's value to the table's unit
    realtime: float | None = None  # figure of MOSS-Video-Preview-Realtime-SFT
    sft: float | None = None  # figure of MOSS-Video-Preview-SFT
    video: bool = False  # whether the task shows videos
    # Where lmms-eval's value counts what was not answered as wrong, the mean of the items' scores
    # times `scale` is taken in its place: over all items (""), or first over those that share this
    # field of what the task keeps. None: lmms-eval's value is taken.
    mean_over: str | None = None

    @property
    def seed(self) -> dict[str, float]:
        """The seed's figures by column."""
        columns = {"seed, realtime": self.realtime, "seed, sft": self.sft}
        return {name: value for name, value in columns.items() if value is not None}


ROWS = (
    # lmms-eval divides by 1000, however many were asked.
    Benchmark("OCRBench", "ocrbench", "ocrbench_accuracy", 1000, 677, 705, mean_over=""),
    Benchmark("MMStar", "mmstar", "average", 100, 53.11, 48.99),
    # Both without a judge: an option's letter or text is searched in the answer.
    Benchmark("MMBench-CN", "mmbench_cn_dev_static", "gpt_eval_score", 1, 83.04, 82.03),
    Benchmark("MMBench-EN", "mmbench_en_dev_static", "gpt_eval_score", 1, 83.97, 83.09),
    Benchmark("MMMU", "mmmu_val", "mmmu_acc", 100, 47.36, 45.26),
    Benchmark("RealWorldQA", "realworldqa", "exact_match", 100, 60.92, 59.48),
    Benchmark("MUIRBench", "muirbench", "muirbench_score_overall", 100, 39.92, 39.88),
    # The seed does not say whether its score is of pictures, clips or both; nor which POPE's is.
    Benchmark("SEEDBench", "seedbench", "seed_image", 100, 69.40, 50.10),
    Benchmark("MME-RealWorld", "mmerealworld", "mme_realworld_score", 100, 44.30, 51.89),
    Benchmark("POPE", "pope", "pope_f1_score", 100, 88.17, 87.88),
    Benchmark("CV-Bench", "cv_bench", "cv_bench_acc", 100, 73.05, 70.17),
    Benchmark("V*", "vstar_bench", "vstar_overall_acc", 1, 49.74, 62.83),
    Benchmark("AI2D", "ai2d", "exact_match", 100, 77.33, 75.06),
    Benchmark("VisuLogic", "visulogic", "visulogic_acc", 100, 28.60, 28.70),
    Benchmark("VLMsAreBlind", "vlmsareblind", "accuracy", 100, 50.21, 47.48),
    Benchmark(ZEROBENCH, "", "accuracy", 100, 7.83, 8.53),
    Benchmark("VideoMME", "videomme", "videomme_perception_score", 1, 62.48, 59.81, True),
    Benchmark("EgoSchema(sub)", "egoschema_subset", "score", 100, 54.80, 47.40, True),
    Benchmark("LongVideoBench", "longvideobench_val_v", "lvb_acc", 100, 51.61, 54.08, True),
    # lmms-eval divides by its seven kinds of tasks, also by those of which nothing was answered.
    Benchmark(
        "MLVU(dev)", "mlvu_dev", "mlvu_percetion_score", 100, 61.81, 60.32, True, "task_type"
    ),
    Benchmark("LVBench", "lvbench", "lvbench_score", 100, 38.93, 39.70, True),
    Benchmark("TempCompass MC", "tempcompass_multi_choice", "avg_accuracy", 1, 59.68, 61.65, True),
    Benchmark("TempCompass YN", "tempcompass_yes_no", "avg_accuracy", 1, 72.03, 70.73, True),
    Benchmark("VSI-Bench", "vsibench", "vsibench_overall", 100, 36.20, 33.48, True),
    Benchmark("Video-Holmes", "video_holmes", "video_holmes_accuracy", 1, 39.30, 39.50, True),
)  # fmt: skip


def chosen(names: list[str]) -> list[Benchmark]:
    """The rows of these names or tasks; all for an empty list. ValueError: one is unknown."""
    known = {word.lower(): row for row in ROWS for word in (row.name, row.task) if word}
    for name in names:
        if name.lower() not in known:
            raise ValueError(f"{name}: is no row of seed25: {', '.join(row.name for row in ROWS)}")
    wanted = [known[name.lower()] for name in names]
    return [row for row in ROWS if row in wanted] if names else list(ROWS)
