"""Scores of base and artifact become tables with recoveries, and only scores of the same test are compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import build, obligations_of
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from builder.errors import BuildError, Problems
from builder.evaluation import Results, Score, compare, load_evaluations, read_lm_eval, read_recorded_accuracy
from builder.lock import CARD_FILES
from builder.manifest import Manifest, load_manifest
from builder.render import render_card
from builder.stages import STAGES, is_current
from builder.stages.verify import describe_expected
from builder.verify import Reading, check_files

RESULTS = Path(__file__).parent / "results"
BASE = RESULTS / "lm-eval-0.4.13-bf16.json"
QUANTIZED = RESULTS / "lm-eval-0.4.13-nvfp4.json"
RECORDS = Path(__file__).parents[1] / "releases" / "deepseek-r1-70b-fp8-dynamic"

Write = Callable[..., Path]


@pytest.fixture
def rewrite(tmp_path: Path) -> Write:
    """Writes the quantized side's file with some values changed: dotted keys -> values."""

    def write(name: str = "quantized.json", **changes: Any) -> Path:
        content = json.loads(QUANTIZED.read_text("utf-8"))
        for dotted, value in changes.items():
            *sections, key = dotted.split("/")
            place = content
            for section in sections:
                place = place[section]
            place[key] = value
        path = tmp_path / name
        path.write_text(json.dumps(content), "utf-8")
        return path

    return write


@pytest.fixture
def write_manifest(tmp_path: Path) -> Callable[..., Manifest]:
    def write(*evaluation: dict[str, Any], **changes: Any) -> Manifest:
        path = tmp_path / "release.yaml"
        content = {
            "manifest": 1,
            "title": "Release",
            "repo": "someone/release",
            "base": {"model": "someone/base", "licenses": ["mit"]},
            "scheme": {"name": "nvfp4"},
            "evaluation": evaluation,
        }
        path.write_text(json.dumps(content | changes), "utf-8")
        return load_manifest(path)

    return write


def score(value: float, task: str = "task", **more: Any) -> Score:
    return Score(**{"task": task, "metric": "acc", "value": value, **more})


def results(*scores: Score, **more: Any) -> Results:
    return Results(**{"file": "f", "tool": "t", "model": "m", "date": "", "tables": {"T": scores}, **more})


# --- lm_eval ----------------------------------------------------------------------------------------------------------


def test_a_file_of_lm_eval_gives_every_metric_with_its_error() -> None:
    read = read_lm_eval(QUANTIZED, "Small ones")
    assert (read.tool, read.model, read.date) == ("lm_eval 0.4.13", "tiny-nvfp4", "2026-11-21")
    found = [(s.task, s.metric, s.value, s.stderr, s.percent, s.higher_is_better) for s in read.tables["Small ones"]]
    assert found == [
        ("sample_mc", "acc", 100.0, 0.0, True, True),
        ("sample_mc", "acc_norm", 100.0, 0.0, True, True),
        ("sample_ppl", "word_perplexity", 172707553.94348228, None, False, False),
        ("sample_ppl", "byte_perplexity", 7.3966717446228785, None, False, False),
        ("sample_ppl", "bits_per_byte", 2.886876252139129, None, False, False),
    ]


def test_the_command_is_told_from_the_file_itself(rewrite: Write) -> None:
    assert read_lm_eval(QUANTIZED).commands == (
        "lm_eval --model local-completions --model_args model=tiny-nvfp4,base_url=http://127.0.0.1:18431/v1/completions,"
        "tokenizer=tiny,tokenizer_backend=huggingface,num_concurrent=2,max_length=512 --tasks sample_mc,sample_ppl "
        "--num_fewshot 0 --batch_size 1",
    )
    changes = {"config/limit": 8, "chat_template_sha": "c0ffee", "fewshot_as_multiturn": True, "n-shot/sample_mc": 5}
    command = read_lm_eval(rewrite(**changes)).commands[0]
    assert command.endswith("--batch_size 1 --limit 8 --apply_chat_template --fewshot_as_multiturn")
    assert "num_fewshot" not in command  # the tasks' own numbers differ


def test_a_fraction_is_shown_in_percent_and_its_error_with_it(rewrite: Write) -> None:
    changed = rewrite(**{"results/sample_mc/acc,none": 0.625, "results/sample_mc/acc_stderr,none": 0.0775})
    assert (read_lm_eval(changed).tables["Tasks"][0].value, read_lm_eval(changed).tables["Tasks"][0].stderr) == (
        62.5,
        7.75,
    )


def test_the_metric_that_is_named_is_the_one_that_is_taken(rewrite: Write) -> None:
    read = read_lm_eval(QUANTIZED, metrics={"sample_mc": "acc_norm", "sample_ppl": "bits_per_byte,none"})
    assert [(s.task, s.metric) for s in read.tables["Tasks"]] == [
        ("sample_mc", "acc_norm"),
        ("sample_ppl", "bits_per_byte"),
    ]
    path = rewrite()
    with pytest.raises(BuildError) as caught:
        read_lm_eval(path, metrics={"sample_mc": "acc_nrom"})
    assert str(caught.value) == (
        f"sample_mc has no metric acc_nrom\n  in {path}\n  fix: did you mean acc_norm? Valid: acc, acc_norm"
    )


def test_a_group_stands_for_its_tasks_and_is_as_comparable_as_they_are(rewrite: Write) -> None:
    group = {
        "results/both": {"alias": "both", "acc,none": 0.5, "acc_stderr,none": 0.1},
        "group_subtasks": {"both": ["sample_mc", "sample_ppl"]},
        "higher_is_better/both": {"acc": True},
        "versions/both": 2,
    }
    read = read_lm_eval(rewrite(**group)).tables["Tasks"]
    assert [(s.task, s.value, s.test["samples"]) for s in read] == [("both", 50.0, 48)]
    theirs = read_lm_eval(rewrite("other.json", **group, **{"versions/sample_mc": 2.0}))
    with pytest.raises(BuildError, match=r"both: version 1.0 for the base, {'sample_mc': 2.0, 'sample_ppl': 1.0} for"):
        compare(read_lm_eval(rewrite(**group)), theirs, "")


def test_a_file_that_is_none_of_lm_eval_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('{"results": {}}', "utf-8")
    with pytest.raises(BuildError) as caught:
        read_lm_eval(path)
    assert str(caught.value) == (
        "results.json is not a result of lm_eval: it lacks configs, versions, n-shot, n-samples, higher_is_better, "
        f"config\n  in {path}\n  fix: give lm_eval's results_TIME.json, or a record ending in .yaml"
    )


# --- what is compared -------------------------------------------------------------------------------------------------


def test_base_and_artifact_are_compared_metric_by_metric(write_manifest: Callable[..., Manifest]) -> None:
    manifest = write_manifest({"base": str(BASE), "quantized": str(QUANTIZED), "name": "Small ones"})
    (table,) = load_evaluations(manifest).tables
    recoveries = [(row.label, row.recovery and round(row.recovery, 2)) for row in table.rows]
    assert recoveries == [
        ("sample_mc (acc, 0-shot)", 100.0),
        ("sample_mc (acc_norm, 0-shot)", 100.0),
        ("sample_ppl (word_perplexity, 0-shot, less is better)", 92.67),
        ("sample_ppl (byte_perplexity, 0-shot, less is better)", 99.2),
        ("sample_ppl (bits_per_byte, 0-shot, less is better)", 99.6),
    ]
    assert table.average is None  # sample_mc would count twice


@pytest.mark.parametrize(
    ("change", "value", "task", "difference"),
    [
        ("versions/sample_mc", 2.0, "sample_mc", "version 1.0 for the base, 2.0"),
        ("n-shot/sample_mc", 5, "sample_mc", "shots 0 for the base, 5"),
        ("n-samples/sample_mc", {"original": 40, "effective": 8}, "sample_mc", "samples 40 for the base, 8"),
        ("chat_template_sha", "c0ffee", "all tasks", "chat template none for the base, c0ffee"),
        ("config/limit", 8.0, "all tasks", "limit none for the base, 8.0"),
        ("config/gen_kwargs", {"top_p": 1}, "all tasks", "generation settings none for the base, {'top_p': 1}"),
        ("system_instruction_sha", "c0ffee", "all tasks", "system instruction none for the base, c0ffee"),
        ("fewshot_as_multiturn", True, "all tasks", "few-shot as turns of a chat none for the base, True"),
        (
            "task_hashes",
            {"sample_mc": "0", "sample_ppl": "f6e60bcbbb90eb0179c46b10d6a546f709b11658b0f60c24a16160ad520c9e41"},
            "sample_mc",
            "prompts ['f14b6557404699bdd22d25550fe3ba30759... for the base, ['0']",
        ),
    ],
)
def test_scores_of_different_tests_are_not_compared(
    rewrite: Write,
    write_manifest: Callable[..., Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    value: Any,
    task: str,
    difference: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.json").write_bytes(BASE.read_bytes())
    rewrite(**{change: value})
    manifest = write_manifest({"base": "base.json", "quantized": "quantized.json"})
    with pytest.raises(BuildError) as caught:
        load_evaluations(manifest)
    key = difference.partition(" none")[0] if task == "all tasks" else difference.split()[0]
    first, place, fix = str(caught.value).splitlines()
    assert first == f"{task}: {difference} for the artifact"
    assert place.startswith("  in release.yaml:1:") and place.endswith(": evaluation[0].quantized: quantized.json")
    assert fix == f"  fix: evaluate both with the same {key}: as they are, their scores say nothing of each other"


def test_all_differences_are_told_together(rewrite: Write, write_manifest: Callable[..., Manifest]) -> None:
    path = rewrite(**{"versions/sample_mc": 2.0, "n-shot/sample_ppl": 5, "config/limit": 8})
    with pytest.raises(Problems) as caught:
        load_evaluations(write_manifest({"base": str(BASE), "quantized": str(path)}))
    assert [problem.what.split(" for ")[0] for problem in caught.value.problems] == [
        "all tasks: limit none",
        "sample_mc: version 1.0",
        "sample_ppl: shots 0",
    ]


def test_a_task_that_one_side_lacks_stays_in_the_table_without_recovery_and_out_of_the_average() -> None:
    (table,) = compare(
        results(score(50), score(60, "b"), score(70, "c")), results(score(40), score(60, "b"), score(1, "d")), ""
    )
    rows = [(row.base and row.base.value, row.quantized and row.quantized.value, row.recovery) for row in table.rows]
    assert rows == [(50, 40, 80.0), (60, 60, 100.0), (70, None, None), (None, 1, None)]
    assert table.average and (table.average.base, table.average.quantized) == (55.0, 50.0)


def test_recovery_is_withheld_over_zero_and_nowhere_else() -> None:
    (table,) = compare(
        results(score(0), score(0.5, "b"), score(4.27, "c")), results(score(0), score(1, "b"), score(5.76, "c")), ""
    )
    assert [row.recovery and round(row.recovery, 1) for row in table.rows] == [None, 200.0, 134.9]
    assert table.average and table.average.recovery  # zeros are in the average, which has a ratio


def test_where_less_is_better_recovery_is_the_base_over_the_artifact() -> None:
    less = {"higher_is_better": False, "percent": False}
    (table,) = compare(results(score(6.0, **less)), results(score(7.5, **less)), "")
    assert table.rows[0].recovery == 80.0


def test_an_average_is_over_scores_in_percent_each_task_once() -> None:
    perplexity = score(6.0, "ppl", percent=False, higher_is_better=False)
    both = results(score(40), score(60, "b"), perplexity)
    assert compare(both, both, "")[0].average == replace(compare(both, both, "")[0].average, base=50.0, quantized=50.0)
    twice = results(score(40), score(60, metric="acc_norm"))
    assert compare(twice, twice, "")[0].average is None
    alone = results(score(40), perplexity)
    assert compare(alone, alone, "")[0].average is None


def test_one_metric_twice_is_refused() -> None:
    with pytest.raises(BuildError, match=r"T has task \(acc\) twice in f"):
        compare(results(score(1), score(2)), results(score(1)), "")


# --- records ----------------------------------------------------------------------------------------------------------


def test_what_a_record_does_not_say_is_no_difference() -> None:
    recorded = read_recorded_accuracy(RECORDS / "accuracy-base.yaml")
    assert recorded.tables["OpenLLM V1"][0].test == {"shots": 25} and recorded.setting == {}
    assert recorded.tables["Reasoning"][0].test == {}


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        ("date: 2025-02-01", "date: 2/1/2025", "date must be a date, YYYY-MM-DD, not 2/1/2025"),
        ("date: 2025-02-01\n", "", "the record lacks the key date"),
        ("shots: 25", "shot: 25", "unknown key tables[1].scores[0].shot"),
        ("value: 67.83", "value: '67,83'", "tables[0].scores[0].value must be a finite number, not 67,83"),
        ("recorded: accuracy", "recorded: speed", "recorded cannot be speed"),
    ],
)
def test_a_mistake_in_a_record_is_told_with_its_line(tmp_path: Path, before: str, after: str, what: str) -> None:
    text = (RECORDS / "accuracy-base.yaml").read_text("utf-8")
    assert before in text
    path = tmp_path / "record.yaml"
    path.write_text(text.replace(before, after, 1), "utf-8")
    with pytest.raises(BuildError) as caught:
        read_recorded_accuracy(path)
    first, place, fix = str(caught.value).splitlines()
    assert first == what and place.startswith(f"  in {path}:") and fix.startswith("  fix: ")


def test_a_record_of_another_base_is_refused(write_manifest: Callable[..., Manifest]) -> None:
    entry = {"base": str(RECORDS / "accuracy-base.yaml"), "quantized": str(RECORDS / "accuracy-quantized.yaml")}
    with pytest.raises(BuildError, match="has scores of deepseek-ai/DeepSeek-R1-Distill-Llama-70B"):
        load_evaluations(write_manifest(entry))


def test_a_file_that_is_not_there_is_told_with_the_manifests_line(write_manifest: Callable[..., Manifest]) -> None:
    manifest = write_manifest({"base": "gone.json", "quantized": str(QUANTIZED)})
    with pytest.raises(BuildError) as caught:
        load_evaluations(manifest)
    assert caught.value.what == "there is no file gone.json"
    assert caught.value.where.endswith(": evaluation[0].base: gone.json")
    assert caught.value.fix == "evaluate first, or leave the entry out until then"


# --- for the Hub ------------------------------------------------------------------------------------------------------

TOLD = {"task": "sample_mc", "metric": "acc_norm", "dataset": "someone/sample", "task_id": "default"}


def test_what_the_hub_is_told_is_as_its_own_library_writes_it(write_manifest: Callable[..., Manifest]) -> None:
    entry = {"base": str(BASE), "quantized": str(QUANTIZED), "hub": [{**TOLD, "revision": "0" * 40}]}
    (told,) = load_evaluations(write_manifest(entry)).hub
    theirs = EvalResultEntry(
        dataset_id="someone/sample",
        task_id="default",
        dataset_revision="0" * 40,
        value=100.0,
        date="2026-11-21",
        source_url="https://huggingface.co/someone/release",
        source_name="Model card",
        notes="lm_eval 0.4.13, acc_norm, 0-shot",
    )
    assert yaml.safe_load(yaml.safe_dump([told])) == eval_result_entries_to_yaml([theirs])


def test_a_score_that_is_not_one_is_not_told_to_the_hub(write_manifest: Callable[..., Manifest]) -> None:
    entry = {"base": str(BASE), "quantized": str(QUANTIZED), "hub": [{**TOLD, "metric": None}]}
    with pytest.raises(BuildError, match="2 scores are of sample_mc"):
        load_evaluations(write_manifest(entry))


def test_another_builds_scores_are_never_told_to_the_hub_as_this_ones(write_manifest: Callable[..., Manifest]) -> None:
    manifest = write_manifest(
        {
            "base": str(RECORDS / "accuracy-base.yaml"),
            "quantized": str(RECORDS / "accuracy-quantized.yaml"),
            "hub": [{**TOLD, "task": "GPQA Diamond", "metric": "pass@1"}],
        },
        base={"model": "deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "licenses": ["mit"]},
    )
    with pytest.raises(BuildError) as caught:
        load_evaluations(manifest)
    assert caught.value.what == (
        "GPQA Diamond was measured on neuralmagic/DeepSeek-R1-Distill-Llama-70B-FP8-dynamic, not on someone/release"
    )


# --- the published card -----------------------------------------------------------------------------------------------

CARD = yaml.safe_load((RESULTS / "fp8-dynamic-card.yaml").read_text("utf-8"))["recovery"]
HALF = 0.005  # the card prints scores to 0.01

# Where the card prints no recovery: zero, over which there is none, and three small scores. One rule explains all of
# them, that a recovery is printed of scores from 20 on (any limit above 14.87 and up to 21.26 would do), its average
# of 15.39 aside. We print them: a loss that is not shown, as of a quarter of GPQA's score, misleads more than a ratio
# that swings.
WITHHELD_THERE = {
    "Math-Hard, Exact-Match": "---",
    "GPQA, Acc-Norm": "73.29 %",
    "MUSR, Acc-Norm": "98.18 %",
    "MMLU-Pro, Acc": "134.89 %",
}


@pytest.fixture
def published(write_manifest: Callable[..., Manifest]) -> Manifest:
    return write_manifest(
        {"base": str(RECORDS / "accuracy-base.yaml"), "quantized": str(RECORDS / "accuracy-quantized.yaml")},
        base={"model": "deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "licenses": ["mit"]},
    )


def printed(text: str) -> tuple[float, float]:
    """What a number may have been before it was rounded to what is printed."""
    half = 0.5 * 10.0 ** -len(text.partition(".")[2])
    return float(text) - half, float(text) + half


def meets(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def bound_recovery(base: float, quantized: float) -> tuple[float, float]:
    """All that a recovery may be, in percent, of scores printed to 0.01."""
    return 100 * (quantized - HALF) / (base + HALF), 100 * (quantized + HALF) / (base - HALF)


def read_card(manifest: Manifest, folder: Path) -> dict[str, list[list[str]]]:
    """The rows of the rendered card's table of accuracy, by category, without marks."""
    card = render_card(manifest, {}, obligations_of(folder))["README.md"]
    table = card.partition("\n### Accuracy\n")[2].partition("\nRecovery is")[0]
    found: dict[str, list[list[str]]] = {}
    for line in table.strip().splitlines()[2:]:
        category, *cells = (cell.strip().strip("*") for cell in line.split("|")[1:-1])
        if category:
            found[category] = []
        list(found.values())[-1].append(cells)
    return found


def test_the_published_cards_recoveries_and_averages_come_out_of_the_renderer(
    published: Manifest, tmp_path: Path
) -> None:
    rows = read_card(published, tmp_path)
    assert list(rows) == list(CARD)
    outside, num_cells = {}, 0
    for table in load_evaluations(published).tables:
        theirs = dict(CARD[table.name])
        for row, (label, base, quantized, recovery) in zip(table.rows, rows[table.name], strict=False):
            assert row.base and row.quantized and label == row.label
            assert (base, quantized) == (f"{row.base.value:.2f}", f"{row.quantized.value:.2f}")
            shown = theirs.pop(f"{row.base.task}, {row.base.metric}")
            num_cells += 1
            if row.recovery is None:
                outside[f"{row.base.task}, {row.base.metric}"] = recovery
                continue
            interval = bound_recovery(row.base.value, row.quantized.value)
            assert interval[0] <= float(recovery.removesuffix(" %")) <= interval[1]
            if shown == "---" or not meets(interval, printed(shown)):
                outside[f"{row.base.task}, {row.base.metric}"] = recovery
        if table.average:
            label, *cells = rows[table.name][-1]
            assert label == "Average"
            ours = (table.average.base, table.average.quantized)
            bounds = [*((mean - HALF, mean + HALF) for mean in ours), bound_recovery(*ours)]
            for cell, interval, shown in zip(cells, bounds, theirs.pop("Average"), strict=True):
                num_cells += 1
                assert interval[0] - 1e-9 <= float(cell.removesuffix(" %")) <= interval[1] + 1e-9
                assert meets(interval, printed(shown)), (table.name, cell, shown)
        assert theirs == {}
    assert num_cells == 19 + 3 * 3
    assert outside == WITHHELD_THERE


def test_one_rule_explains_where_the_published_card_withholds_a_recovery(published: Manifest) -> None:
    pairs = [
        (row.base.value, CARD[table.name][f"{row.base.task}, {row.base.metric}"] == "---")
        for table in load_evaluations(published).tables
        for row in table.rows
        if row.base
    ]
    assert max(value for value, withheld in pairs if withheld) == 14.87
    assert min(value for value, withheld in pairs if not withheld) == 21.26


def test_a_table_in_which_a_task_is_twice_has_no_average_as_on_the_published_card(published: Manifest) -> None:
    averaged = {table.name: table.average is not None for table in load_evaluations(published).tables}
    assert averaged == {"Reasoning": True, "OpenLLM V1": True, "OpenLLM V2": True, "Coding": False}
    assert {name: "Average" in rows for name, rows in CARD.items()} == averaged


def test_the_card_says_whose_figures_they_are_and_how_they_were_made(published: Manifest, tmp_path: Path) -> None:
    card = render_card(published, {}, obligations_of(tmp_path))["README.md"]
    source = "recorded from <https://huggingface.co/neuralmagic/DeepSeek-R1-Distill-Llama-70B-FP8-dynamic>, 2025-02-01"
    assert f"- Base model: `deepseek-ai/DeepSeek-R1-Distill-Llama-70B`, {source}\n" in card
    assert (
        f"- This model: `neuralmagic/DeepSeek-R1-Distill-Llama-70B-FP8-dynamic`, {source}. "
        "**These are another build's figures, not measured on the files here**\n"
    ) in card
    assert card.count("```bash\nlm_eval --model vllm") == 2 and "--tasks leaderboard" in card
    assert card.count("The card prints HumanEval+ (pass@10) twice") == 1
    assert "Task accuracy: not measured" not in card and "Serving speed: not measured." in card


def test_the_files_around_the_payload_have_the_hubs_entries(
    write_manifest: Callable[..., Manifest], tmp_path: Path
) -> None:
    entry = {"base": str(BASE), "quantized": str(QUANTIZED), "hub": [TOLD]}
    files = render_card(write_manifest(entry), {}, obligations_of(tmp_path))
    assert yaml.safe_load(files[".eval_results/results.yaml"])[0]["dataset"] == {
        "id": "someone/sample",
        "task_id": "default",
    }
    assert ".eval_results/results.yaml" in CARD_FILES  # around the payload, and so never in the lock
    without = render_card(write_manifest({**entry, "hub": []}), {}, obligations_of(tmp_path))
    assert ".eval_results/results.yaml" not in without
    assert (
        "| sample\\_mc" not in files["README.md"] and "sample_mc (acc, 0-shot) | 100.00 ± 0.00 |" in files["README.md"]
    )


# --- in a build -------------------------------------------------------------------------------------------------------


def test_results_that_cannot_be_compared_are_refused_before_any_weight_is_read(
    write_release: Write, tmp_path: Path
) -> None:
    entry = {"base": str(BASE), "quantized": "gone.json"}
    with pytest.raises(BuildError, match=r"there is no file gone\.json"):
        build(write_release(evaluation=[entry]), tmp_path / "build", "plan")


def test_a_card_is_rendered_again_when_a_result_file_changed_and_told_scores_lie_beside_the_payload(
    write_release: Write, rewrite: Write, tmp_path: Path
) -> None:
    path = rewrite()
    entry = {"base": str(BASE), "quantized": str(path), "hub": [TOLD]}
    quick = {"scheme.input_scale": "unit", "calibration": None, "perplexity": None}
    workspace = build(write_release(evaluation=[entry], **quick), tmp_path / "build", "card", without=("verify",))
    stages = {stage.name: stage for stage in STAGES}
    assert is_current(workspace, stages["card"])
    assert (workspace.artifact / ".eval_results" / "results.yaml").is_file()
    assert ".eval_results/results.yaml" not in workspace.lock_path.read_text("utf-8")
    (workspace.artifact / ".other").mkdir()
    reading = Reading(workspace.artifact, workspace.base_folder(), describe_expected(workspace))
    check_files(reading)
    assert [found.what for found in reading.findings] == ["the folder .other does not belong here"]
    rewrite(**{"results/sample_mc/acc,none": 0.5})
    assert not is_current(workspace, stages["card"])
