import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from mlxtune.export import card
from mlxtune.export.facts import Facts, of_adapter, of_fused
from mlxtune.report.score import Score
from mlxtune.rundir import RunDir, read_json


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**read_json(path), **changes}), encoding="utf-8")


def written(folder: Path) -> tuple[str, Any]:
    """The card's text, and its metadata as the hub's own library reads them."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    return text, ModelCard(text).data


def test_the_hub_reads_what_the_fused_card_says(run: RunDir) -> None:
    card.write_fused(run.fused, run)
    text, data = written(run.fused)
    assert (data.library_name, data.pipeline_tag, data.license) == ("mlx", "text-generation", "apache-2.0")
    assert (data.base_model, data.base_model_relation, data.language) == ("small-base", "finetune", ["en", "de"])
    assert data.tags == ["mlx", "mlxtune", "lora", "4-bit"]
    assert data.datasets == ["rows.jsonl"] and data.dataset_files[0]["sha256"] == f"{2:064x}"
    by_type = {each.metric_type: each for each in data.eval_results}
    assert by_type["accuracy"].metric_value == pytest.approx(80 / 90, abs=1e-6)
    assert by_type["accuracy"].metric_args["rows"] == 90
    assert by_type["accuracy"].metric_args["ci_95"] == pytest.approx([0.8074, 0.9385], abs=1e-3)
    assert by_type["loss"].metric_value == pytest.approx(0.51)
    assert {each.dataset_split for each in data.eval_results} == {"test"}
    assert {each.dataset_revision for each in data.eval_results} == {f"{2:064x}"}
    for words in (
        "small-base with LoRA on 700 rows, fused into one model by mlxtune: 1.6 MB, 4.53 bits per weight.",
        "| accuracy | 10 % (5-18) | 90 % (82-95) | 88.9 % (81-94) |",
        "| share of the gain that is kept | 99.4 % |",
        "| KL divergence from base + adapter | 0.002 nats per token |",
        "On 80 validation rows",
        "- 90 held-out rows are few",
        "personal data in 7 places",
        "- rows: 700 train, 80 valid, 90 test",
        "seed: 3",
        '  targets: ["all-linear"]',
    ):
        assert words in text, words


def test_the_adapter_has_a_card_of_its_own(run: RunDir) -> None:
    card.write_adapter(run)
    text, data = written(run.adapter)
    assert data.base_model_relation == "adapter" and data.tags == ["mlx", "mlxtune", "lora"]
    assert {each.metric_type: each.metric_value for each in data.eval_results}["accuracy"] == pytest.approx(0.9)
    assert "## What fusing kept" not in text and "--adapter-path path/to/this/folder" in text
    assert "| accuracy | 10 % (5-18) | 90 % (82-95) |" in text


def test_nothing_of_the_machine_or_the_rows_is_in_it(run: RunDir, tmp_path: Path) -> None:
    card.write_fused(run.fused, run)
    card.write_adapter(run)
    for folder in (run.fused, run.adapter):
        text, _ = written(folder)
        for private in (str(tmp_path), "somebody", "secret", "token-123", "parcel", "Mrs", "wandb", "a.txt", "host"):
            assert private not in text
        assert re.search(r"(^|[\s'\"(])/(?!\w+>)\w", text) is None  # an absolute path


def test_before_the_fused_model_is_scored_the_tuned_scores_stand_for_it(run: RunDir) -> None:
    run.evaluation("fused").unlink()
    card.write_fused(run.fused, run)
    text, data = written(run.fused)
    assert {each.metric_type: each.metric_value for each in data.eval_results}["accuracy"] == pytest.approx(0.9)
    assert "|  | base | tuned |\n" in text


def test_a_scratch_folder_of_the_run_is_its_own_and_another_folder_is_not(run: RunDir, tmp_path: Path) -> None:
    for folder, own in ((run.root / ".fused.partial-7", True), (run.root / "other", False), (tmp_path / "out", False)):
        folder.mkdir()
        shutil.copy(run.fused / "fuse.json", folder)
        edit(folder / "fuse.json", adapters={os.path.relpath(run.adapter, folder): 1.0})
        assert ("fused" in of_fused(folder, run).scores) == own
        assert of_fused(folder, None).scores["tuned"] == of_fused(folder, run).scores["tuned"]


def test_several_adapters_are_a_merge_without_the_figures_of_one(run: RunDir) -> None:
    edit(run.fused / "fuse.json", adapters={"../adapter": 0.7, "../second": 0.3})
    card.write_fused(run.fused)
    text, data = written(run.fused)
    assert data.base_model_relation == "merge" and "merge" in data.tags and data.eval_results is None
    assert "2 adapters, fused into it" in text and "It has not been scored" in text


def test_a_model_of_the_hub_is_named_with_its_revision(run: RunDir, tmp_path: Path) -> None:
    commit = "ab" * 20
    cached = tmp_path / "hub" / "models--org--Base-1.5" / "snapshots" / commit
    model = read_json(run.origin)["model"]
    edit(run.origin, model={**model, "name": "org/Base-1.5", "path": str(cached), "revision": commit})
    card.write_fused(run.fused, run)
    text, data = written(run.fused)
    assert data.base_model == "org/Base-1.5" and f"org/Base-1.5 at revision {commit}" in text
    # without a run the adapter's own word for its base
    run.origin.unlink()
    edit(run.adapter / "adapter_config.json", model=str(cached))
    assert (of_adapter(run).base, of_adapter(run).revision) == ("org/Base-1.5", commit)


@pytest.mark.parametrize("damage", ["{", "[]", '{"scores": [{"metric": 1}]}', "\x00"])
def test_damaged_files_say_less_and_fail_nothing(run: RunDir, damage: str) -> None:
    for path in (run.origin, run.evaluation("fused"), run.evaluation("tuned"), run.evaluation("base"), run.recipe):
        path.write_text(damage)
    for path in (run.data / "audit.json", run.adapter / "training.json", run.adapter / "adapter_config.json"):
        path.write_text(damage)
    card.write_fused(run.fused, run)
    text, data = written(run.fused)
    assert data.base_model == "unknown" and data.license is None
    assert "It has not been scored on held-out rows." in text and "No licence was found" in text


def test_an_empty_folder_has_a_card(tmp_path: Path) -> None:
    card.write_fused(tmp_path)
    assert "Not measured: there were no validation rows." in written(tmp_path)[0]


HOSTILE = "x\n---\n<script>alert(1)</script> | [a](javascript:b) `c` \x1b[31m\u202e: {{ d }} ![e](f)\n# G"


def test_hostile_texts_stay_texts() -> None:
    score = Score(metric=HOSTILE, value=0.5, unit=HOSTILE, ci_low=0.4, ci_high=0.6, n=9, better="higher")
    facts = Facts(
        kind="fused",
        base=HOSTILE,
        revision=HOSTILE,
        data={HOSTILE: HOSTILE},
        base_hashes={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
        device=HOSTILE,
        scores={"fused": [score]},
        fuse={"bits": 4, "fused_loss": HOSTILE, "bits_per_weight": HOSTILE, "bytes": None},
        settings={HOSTILE: {HOSTILE: 1}},
        decision=HOSTILE,
        forgetting={"base_loss": HOSTILE},
    )
    text = card.card(facts)
    data = ModelCard(text).data
    assert re.fullmatch(r"[\w./-]+", data.base_model) and data.eval_results[0].metric_value == 0.5
    body = text.split("\n---\n", 1)[1]
    assert "<script" not in body and "\x1b" not in text and "\u202e" not in text
    assert [line for line in body.split("\n") if line.startswith("#")] == [
        f"# {card._plain(facts.name)}",
        "## Figures",
        "## What fusing kept",
        "## Intended use and limits",
        "## How to run it",
        "## How it was made",
    ]
    assert "[a](" not in body and "![e](" not in body and "\\[a\\](javascript:b)" in body


def test_the_decision_of_a_comparison_and_what_was_forgotten_are_limits(run: RunDir) -> None:
    (run.compare).mkdir()
    comparison = {"verdict": {"decision": "prompt"}, "forgetting": {"base_loss": 2.0, "tuned_loss": 2.25}}
    (run.compare / "compare.json").write_text(json.dumps(comparison))
    text = card.card(of_adapter(run))
    assert "found a prompt to be enough" in text
    assert "On other text the loss went from 2.000 nats per token to 2.250 nats per token by tuning." in text
    assert "that was not measured" not in text


def test_the_same_files_give_the_same_card(run: RunDir) -> None:
    assert card.card(of_fused(run.fused, run)) == card.card(of_fused(run.fused, run))
