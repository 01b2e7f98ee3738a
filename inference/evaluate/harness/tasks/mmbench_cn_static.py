"""MMBench-CN for lmms-eval: its own functions, and its evaluator without a judge."""

from __future__ import annotations

from typing import Any

from lmms_eval.tasks.mmbench import cn_utils

doc_to_visual = cn_utils.mmbench_doc_to_visual
doc_to_text = cn_utils.mmbench_doc_to_text


def process_results(doc: Any, results: Any) -> dict[str, Any]:
    """What `aggregate` gets of an item."""
    return {"gpt_eval_score": cn_utils.mmbench_process_results(doc, results)["gpt_eval_score"]}


def aggregate(results: Any) -> float:
    """Percent of right answers."""
    overall, _, _ = cn_utils.mmbench_evaluator.eval_result(results, eval_method="static")
    return float(100 * overall)
