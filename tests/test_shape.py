# SPDX-License-Identifier: Apache-2.0
"""The shape of the three programs: a stack of sections, short functions, and paragraphs."""

import ast
import re

import pytest
from nodes import TOP

BANNER = re.compile(r"# --- (.+?) -{5,}")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

pytestmark = pytest.mark.parametrize(
    "program",
    ["apppot_start.py", "apppot_init.py", "changes.py"],
    indirect=True,
)


class Program:
    """The text of a program, and what ast finds in it."""

    def __init__(self, text):
        self.lines = text.splitlines()
        self.tree = ast.parse(text)
        self.banners = [number for number, line in enumerate(self.lines, 1) if BANNER.fullmatch(line)]

    def find_all(self, *kinds):
        return [node for node in ast.walk(self.tree) if isinstance(node, kinds)]

    def section_of(self, node):
        """The number of the section that holds a node; 0 is what stands above the first banner."""
        return sum(number <= node.lineno for number in self.banners)

    def read_text(self, node):
        return self.lines[node.lineno - 1 : node.end_lineno]


@pytest.fixture(scope="module")
def program(request):
    return Program((TOP / request.param).read_text())


def list_names(node, context):
    """The names that a piece of a program binds (ast.Store) or reads (ast.Load)."""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, context)}

    if context is ast.Store:
        names.update(part.arg for part in ast.walk(node) if isinstance(part, ast.arg))

    return names


def list_definitions(program):
    """What a program defines outside of functions and classes: pairs of a name and its statement."""
    for statement in program.tree.body:
        if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
            yield statement.name, statement
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            for name in list_names(statement, ast.Store):
                yield name, statement


def test_a_section_uses_only_the_sections_above_it(program):
    definitions = list(list_definitions(program))
    section_of = {name: program.section_of(statement) for name, statement in definitions}
    assert len(set(section_of.values())) > 5

    upwards = [
        f"{user} uses {name}"
        for user, statement in definitions
        for name in list_names(statement, ast.Load) - list_names(statement, ast.Store)
        if section_of.get(name, 0) > program.section_of(statement)
    ]
    assert upwards == []


def test_no_function_has_more_than_50_lines_and_no_class_more_than_250(program):
    def find_longer(limit, *kinds):
        return [node.name for node in program.find_all(*kinds) if len(program.read_text(node)) > limit]

    assert find_longer(50, *FUNCTIONS) == []
    assert find_longer(250, ast.ClassDef) == []


def test_no_tuple_has_more_than_20_fields(program):
    tuples = [node for node in program.find_all(ast.ClassDef) if "NamedTuple" in map(ast.unparse, node.bases)]
    fields = {node.name: sum(isinstance(part, ast.AnnAssign) for part in node.body) for node in tuples}

    assert min(fields.values()) > 0
    assert [name for name in fields if fields[name] > 20] == []


def test_most_functions_of_15_lines_and_more_have_paragraphs(program):
    long = [node for node in program.find_all(*FUNCTIONS) if len(program.read_text(node)) >= 15]
    packed = [node.name for node in long if all(map(str.strip, program.read_text(node)))]
    assert len(packed) / len(long) < 0.2, packed


def test_hardly_any_line_is_wider_than_100_characters(program):
    wide = [number for number, line in enumerate(program.lines, 1) if len(line) > 100]
    assert len(wide) / len(program.lines) < 0.03, wide
