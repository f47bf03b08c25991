"""Tests of operation and program names."""

import doctest

import pytest

from samovar import operations
from samovar.operations import OPERATIONS, parse_program_name, program_name


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("variant", ["", "inpaint"])
def test_program_name_is_parsed_into_operation_and_variant(operation: str, variant: str) -> None:
    assert parse_program_name(program_name(operation, variant)) == (operation, variant)


def test_documented_examples_match_code() -> None:
    results = doctest.testmod(operations)
    assert (results.failed, results.attempted) == (0, 2)
