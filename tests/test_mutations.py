"""The list of mutations fits the source; each is caught by its test (slow)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # whatever pytest's import mode

import mutations
from mutations import MUTATIONS, Mutation


def test_every_mutation_fits_the_source_and_names_a_test() -> None:
    assert mutations.defects() == []
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


def test_a_stale_mutation_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = Mutation("stale", "maths/kl.py", "not in the file", "x", "maths/test_kl.py::test_that_is_not_there")
    monkeypatch.setattr(mutations, "MUTATIONS", [stale])
    assert mutations.defects() == [
        "stale: its old text stands 0 times in maths/kl.py, not once",
        "stale: maths/test_kl.py has no test_that_is_not_there",
    ]


@pytest.mark.slow
def test_without_a_mutation_the_named_tests_pass() -> None:
    code, output = mutations.run_tests(mutations.SOURCE, sorted({mutation.test for mutation in MUTATIONS}))
    assert code == mutations.PASSED, output


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_mutation_is_caught(mutation: Mutation) -> None:
    assert mutations.survives(mutation) is None


@pytest.mark.slow
def test_a_harmless_patch_survives() -> None:
    """Else the harness would call everything caught."""
    harmless = Mutation(
        "a comment",
        "maths/kl.py",
        "return logratio\n",
        "return logratio  # k1\n",
        "maths/test_kl.py::test_k2_agrees_to_second_order",
    )
    assert "passes all the same" in str(mutations.survives(harmless))
