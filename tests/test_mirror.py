"""Tests mirror the package: moe_train/a/b.py is tested in tests/a/test_b.py, or stands in a table with the reason.

What crosses files lives in tests/integration/, what needs torch in tests/judges/; each has an index with one line a file.
"""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "moe_train"

# file of the package -> where it is tested instead, and why
TESTED_ELSEWHERE: dict[str, str] = {
    "config/trackers.py": "run/trackers/test_trackers.py uses its sections; the file only declares them",
    "config/profile.py": "run/test_profiling.py traces the steps that it states",
    "run/trackers/tracker.py": "run/trackers/test_worker.py opens a tracker; the file only declares it",
    "model/attention/places.py": "model/attention/test_kernels.py masks by it; the file only declares it",
    "__main__.py": "cli/test_main.py runs the command as a process",
    "cli/arguments.py": "cli/test_main.py gives commands these arguments; the file only declares them",
    "data/check/findings.py": "data/check/test_examine.py looks at what examine finds; the file only declares it",
    "data/check/results.py": "data/check/test_check.py looks at these results; the file only declares them",
    "data/check/redacted.py": "data/check/test_personal_data.py looks at reports and corrected copies",
    "governance/model_documentation.py": "commands/test_evidence.py looks at the form, and at the other pages",
    "governance/overview.py": "commands/test_evidence.py looks at the folder that it describes",
    "governance/provenance.py": "commands/test_evidence.py follows the chain, with changed and missing files",
    "governance/sealed_folder.py": "commands/test_evidence.py checks a folder, and changes it",
    "governance/training_summary.py": "commands/test_evidence.py looks at the summary",
    "governance/upstream.py": "commands/test_evidence.py finds the run of an export, and others",
    "commands/erase_records.py": "commands/test_find_records.py erases what it has found",
    "data/records/search.py": "commands/test_find_records.py looks for texts, patterns and hashes",
    "governance/find_in_runs.py": "commands/test_find_records.py compares it with the loader's trace",
    "config/conversion/dataset_info.py": "config/conversion/test_llama_factory.py converts configs with and without one",
    "cli/data_search.py": "cli/test_data.py gives the commands their arguments",
    "cli/evidence.py": "cli/test_models.py gives the command its arguments",
    "evaluate/suites/not_graded.py": "evaluate/suites/test_own_function.py raises it; the file only declares it",
    "commands/compare_adapters.py": "commands/test_adapters.py compares its norms with numpy's",
    "commands/origin_of_export.py": "commands/test_export.py compares the texts and the origin of exports",
    "commands/serve_export.py": "commands/test_export.py asks for the commands of several exports",
    "model/stack.py": "model/test_transformer.py compares stacked layers with single ones",
    "commands/evaluate.py": "integration/test_bad_input.py evaluates files, and refuses others, through the command",
    "commands/chat.py": "commands/test_generate.py holds a conversation",
    "commands/text_generator.py": "commands/test_generate.py opens a model with it, as all commands that generate do",
    "evaluate/generation/programs.py": "evaluate/generation/test_generator.py runs both programs, on two meshes",
    "commands/verify_answers.py": "commands/test_evaluate_suite.py verifies the answers that it has recorded",
    "model/moe/expert_weights.py": "model/moe/test_experts.py runs experts with these weights; the file only declares them",
    "config/average.py": "run/test_averaging.py trains with both kinds; the file only declares them",
    "commands/evaluate_harness.py": "judges/test_lm_eval.py runs tasks through it; it needs the extra eval",
    "evaluate/lm_harness.py": "judges/test_lm_eval.py compares it with the harness's own model; it needs the extra eval",
    "commands/train.py": "integration/test_own_records.py trains through it; it only joins resolve and the loop",
    "cli/classify.py": "integration/test_heads.py scores files as the command does",
    "commands/classify.py": "integration/test_heads.py scores texts with a run and with its export",
    "commands/evaluate_scores.py": "integration/test_heads.py measures classifiers and a reward model",
    "commands/text_scorer.py": "integration/test_heads.py opens models with it",
    "evaluate/scores.py": "integration/test_heads.py scores texts of several lengths through it",
    "evaluate/teacher.py": "commands/test_prepare_teacher.py compares its predictions with the teacher's logits",
    "config/distillation.py": "train/objectives/test_distillation.py minimizes every setting of it",
    "data/batches/classification_batch.py": "train/objectives/test_classification.py fills its rows",
    "data/batches/distillation_batch.py": "train/objectives/test_distillation.py compares losses on it",
    "data/batches/reward_batch.py": "train/objectives/test_reward.py fills its rows",
    "data/chat/classified_to_tokens.py": "integration/test_heads.py trains on texts and conversations",
    "data/prepared/teacher_reader.py": "commands/test_prepare_teacher.py reads stored predictions",
    "data/prepared/teacher_set.py": "commands/test_prepare_teacher.py writes, interrupts and continues sets",
}
OUTSIDE_THE_MIRROR = {"integration", "judges", "benchmarks", "campaign"}


def package_files() -> list[str]:
    return sorted(str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if file.name != "__init__.py")


def test_file_of(source: str) -> Path:
    path = Path(source)
    return TESTS / path.parent / f"test_{path.name}"


test_file_of.__test__ = False  # type: ignore[attr-defined]  # a function of this test, not a test


@pytest.mark.parametrize("source", package_files())
def test_a_file_has_its_test_at_the_same_path(source: str) -> None:
    has_test = test_file_of(source).is_file()
    assert has_test != (source in TESTED_ELSEWHERE), "write the test, or say in TESTED_ELSEWHERE where it is tested and why"


def test_exceptions_name_files_that_exist() -> None:
    assert set(TESTED_ELSEWHERE) <= set(package_files())
    for reason in TESTED_ELSEWHERE.values():
        assert (TESTS / reason.split(" ")[0]).is_file(), reason


def test_no_test_file_has_lost_its_source() -> None:
    for file in TESTS.rglob("test_*.py"):
        relative = file.relative_to(TESTS)
        if relative.parts[0] in OUTSIDE_THE_MIRROR or len(relative.parts) == 1:
            continue
        assert (PACKAGE / relative.parent / relative.name.removeprefix("test_")).is_file(), f"{relative} tests no file of its own"


@pytest.mark.parametrize("folder", ["integration", "judges"])
def test_the_index_has_a_line_for_each_file(folder: str) -> None:
    index = (TESTS / folder / "README.md").read_text(encoding="utf-8")
    for file in sorted((TESTS / folder).iterdir()):
        if file.suffix in (".py", ".mjs"):
            assert f"- `{file.name}`: " in index, f"tests/{folder}/README.md has no line for {file.name}"
