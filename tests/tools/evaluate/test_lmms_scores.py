"""Each item has the score that its task counts: what lmms-eval's own tasks make of answers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from inference.evaluate.harness.lmms import grade
from inference.evaluate.harness.lmms_runner import __file__ as RUNNER
from tests.tools.evaluate.test_lmms import ENVIRONMENT, environment

pytestmark = pytest.mark.skipif(bool(environment()), reason=environment() or "it is there")

# Runs in lmms-eval's environment: a task's functions on one question, as its evaluator runs them.
SCRIPT = """
import json, random, sys
from types import SimpleNamespace as Fields
sys.path.insert(0, sys.argv[1])
import lmms_runner
from lmms_eval import evaluator
from lmms_eval.tasks.longvideobench import utils as longvideobench
from lmms_eval.tasks.mmbench import en_utils as mmbench
from lmms_eval.tasks.mmmu import utils as mmmu
from lmms_eval.tasks.tempcompass import utils as tempcompass

lmms_runner.refuse_judges()
lmms_runner.score_answers(evaluator)
OPTIONS = dict(A="a cat", B="a dog", C="nan", D="nan", E="nan")
MMBENCH = dict(index=3, question="?", answer="B", hint="nan", source="", split="dev", category="c",
               **{"L2-category": "l"}, **OPTIONS)
MMMU = dict(id="validation_Accounting_1", question_type="multiple-choice", options="['1', '2']",
            answer="B")
OPEN = MMMU | dict(question_type="open", answer="5")
TEMPCOMPASS = dict(video_id="1", question="?", answer="A. red", dim="speed")
LONG = dict(id="1", duration_group=15, question_category="T", correct_choice=1, option0="x",
            option1="y", option2="N/A", answer="B")
TASKS = {
    "mmbench": ("mmbench_en_dev_static", MMBENCH, mmbench.mmbench_process_results, "gpt_eval_score",
                lambda kept: mmbench.mmbench_evaluator.eval_result(kept, "static")[0]),
    "mmmu": ("mmmu_val", MMMU, mmmu.mmmu_process_results, "mmmu_acc", mmmu.mmmu_aggregate_results),
    "open": ("mmmu_val", OPEN, mmmu.mmmu_process_results, "mmmu_acc", mmmu.mmmu_aggregate_results),
    "tempcompass": ("tempcompass_multi_choice", TEMPCOMPASS,
                    tempcompass.tempcompass_process_results_multi_choice, "avg_accuracy",
                    lambda kept: tempcompass.tempcompass_aggregate_rating(kept, None) / 100),
    "long": ("longvideobench_val_v", LONG, longvideobench.longvideobench_process_results,
             "lvb_acc", longvideobench.longvideobench_aggregate_results),
}

def scored(name, answer):
    task, doc, process, metric, aggregate = TASKS[name]
    request = Fields(resps=[answer], filtered_resps={"": answer}, raw_filtered_resps={}, args=(),
                     token_counts=None, doc=doc)
    fields = dict(config=Fields(task=task, repeats=1), doc_to_target=lambda doc: doc["answer"])
    fields["process_results"] = lambda doc, results: process(dict(doc), results)
    done = evaluator._process_document_results(
        (0, doc, [request]), task=Fields(**fields), filter_key="", reasoning_tags=None,
        log_samples=True,
    )
    kept = done.metrics.get(metric)
    left_out = done.logged_sample.get(lmms_runner.LEFT_OUT)
    return dict(kept=kept, counts=None if kept is None else aggregate([kept]), left_out=left_out)

found = [scored(*pair) for pair in json.load(sys.stdin)]
random.random()
again = [scored("long", "Perhaps.") for _ in range(8)]
print("\\n" + json.dumps([found, again]))
"""
SAID = {
    "mmbench": ["B", "(B)", "B. a dog", "The answer is B.", "It is a dog", "**B**", "答案是B", "A"],
    "mmmu": ["B", "(B)", "The answer is B.", "A"],
    "open": ["5", "It is 5.0", "7"],
    "tempcompass": ["A. red", "A", "B) blue", "The answer is A", "(A) red"],
    "long": ["B", "(B)", "The answer is A"],
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the script prints for all of SAID."""
    pairs = [(name, answer) for name, answers in SAID.items() for answer in answers]
    home = str(tmp_path_factory.mktemp("hf"))
    done = subprocess.run(
        [ENVIRONMENT / "bin/python", "-c", SCRIPT, str(Path(RUNNER).parent)],
        input=json.dumps(pairs), capture_output=True, text=True, cwd=home,
        env={"HF_HOME": home, "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines, again = json.loads(done.stdout.splitlines()[-1])
    return [dict(zip(pairs, lines, strict=True)), again]


@pytest.mark.parametrize("name", SAID)
def test_an_items_score_is_what_the_task_counts_of_it_alone(name: str, found: list[Any]) -> None:
    values = [found[0][name, answer] for answer in SAID[name]]
    for value in values:
        assert grade(value["kept"]) == value["counts"]
    assert {0.0, 1.0} <= {value["counts"] for value in values}


def test_answers_that_a_judge_would_read_are_left_out_without_one(found: list[Any]) -> None:
    left = {pair: value["left_out"] for pair, value in found[0].items() if value["left_out"]}
    assert left == {
        ("tempcompass", "The answer is A"): "no judge", ("tempcompass", "(A) red"): "no judge",
    }  # fmt: skip


def test_an_option_that_is_drawn_is_the_same_in_each_run(found: list[Any]) -> None:
    """LongVideoBench draws one where it finds none in the answer."""
    drawn = [value["kept"]["parsed_pred"] for value in found[1]]
    assert set(drawn) in ({"A"}, {"B"})
