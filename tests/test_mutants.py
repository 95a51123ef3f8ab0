"""The list of small errors stays applicable: every edit is of the code as it is, and names tests that exist."""

import ast
import re

from benchmarks.mutants import ROOT, check, read


def test_every_edit_applies_and_is_a_program():
    mutants = read()
    check(mutants)
    for mutant in mutants:
        text = (ROOT / mutant.file).read_text(encoding="utf-8").replace(mutant.find, mutant.put)
        ast.parse(text, mutant.what)  # an edit that cannot be read would be caught by any test
        assert mutant.find != mutant.put, mutant.what
    assert 3 * sum(mutant.late for mutant in mutants) >= len(mutants)


def test_every_edit_names_tests_that_exist():
    for mutant in read():
        assert mutant.tests, mutant.what
        for test in mutant.tests:
            file, _, name = test.partition("::")
            text = (ROOT / file).read_text(encoding="utf-8")
            assert not name or re.search(rf"^def {name.partition('[')[0]}\(", text, re.MULTILINE), test
