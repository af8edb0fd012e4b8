"""Builds the evaluation data of the reference model from the held-out modules of the standard library.

    python -m optimizer.evals.reference.build_tasks          # from the copies in held_out/modules
    python -m optimizer.evals.reference.build_tasks --copy   # first renews those copies from the running interpreter

Written to `held_out/`, the same bytes for the same modules:
- `perplexity.jsonl`: whole modules cut into documents of at most 1400 characters at line ends, ideally where a
  definition begins. Nearly all (310 of 317) fit the 512-token context the model was trained at; longer ones are
  scored in two windows.
- `next_line.jsonl`: a context and four candidate next lines of the same indentation and similar length; one of
  the wrong ones comes from the same module, two from others.
- `cloze.jsonl`: a context cut just before an identifier that it already shows after the same word, or before a run
  of closing brackets; the target is what comes next. The mark before an identifier (space, dot, parenthesis) is
  left out of the context, because byte-level tokenizers join it with the word.

Items are shuffled with a fixed seed, so the first n of a file are a fair sample of it.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import keyword
import random
import re
import shutil
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELD_OUT = Path(__file__).parent / "held_out"
DOCUMENT_CHARACTERS = 1400
CONTEXT_CHARACTERS = (200, 380)
CLOZE_CHARACTERS = (140, 380)
NEXT_LINE_ITEMS = 700
CLOZE_IDENTIFIERS, CLOZE_BRACKETS = 340, 60
SEED = 20

Row = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """A line of code: where it stands and what it holds, without its newline."""

    module: str
    number: int
    text: str

    @property
    def indent(self) -> int:
        """Leading blanks."""
        return len(self.text) - len(self.text.lstrip())


def read_modules(folder: Path = HELD_OUT) -> dict[str, str]:
    """The text of each held-out module by name, in alphabetical order."""
    paths = sorted((folder / "modules").glob("*.py.txt"))
    return {path.name.removesuffix(".py.txt"): path.read_text(encoding="utf-8") for path in paths}


def prose_lines(text: str) -> set[int]:
    """Numbers (from 1) of the lines that a docstring or any string over several lines touches."""
    strings = (node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Constant, ast.JoinedStr, ast.Expr)))
    numbers: set[int] = set()
    for node in strings:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_string = isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
        last = node.end_lineno or node.lineno
        if is_docstring or (is_string and last > node.lineno):
            numbers.update(range(node.lineno, last + 1))
    return numbers


def code_lines(module: str, text: str) -> list[Line]:
    """Lines worth predicting: code of 12 to 72 characters, not comments, prose, or brackets alone."""
    prose = prose_lines(text)
    lines = (Line(module, number, raw) for number, raw in enumerate(text.splitlines(), 1) if number not in prose)
    return [
        line
        for line in lines
        if not line.text.lstrip().startswith("#")
        and 12 <= len(line.text.strip()) <= 72
        and re.search(r"[A-Za-z]{3}", line.text)
    ]


def context_before(text: str, end: int, length: int) -> str:
    """The text that ends at offset `end`, from the line start that makes it at least `length` characters."""
    start = text.rfind("\n", 0, max(0, end - length)) + 1
    return text[start:end]


def documents(module: str, text: str) -> Iterator[Row]:
    """Cut a module at line ends into documents of at most `DOCUMENT_CHARACTERS`; joined they are the module."""
    start, part = 0, 0
    while start < len(text):
        end = min(len(text), start + DOCUMENT_CHARACTERS)
        if end < len(text):
            definitions = [m.start() for m in re.finditer(r"^ {0,4}(?:def|class|@)", text[start:end], re.M)]
            late = [start + offset for offset in definitions if offset > DOCUMENT_CHARACTERS // 2]
            end = late[-1] if late else text.rfind("\n", start, end) + 1
        yield {"module": module, "part": part, "text": text[start:end]}
        start, part = end, part + 1


def distractors(line: Line, pool: Sequence[Line], context: str, draw: random.Random) -> list[str] | None:
    """Three wrong next lines: one from the same module, two from others; None when there are too few."""

    def alike(other: Line) -> bool:
        size, other_size = len(line.text.strip()), len(other.text.strip())
        return other.indent == line.indent and 0.6 <= other_size / size <= 1.67 and other.text not in context

    rivals = [other for other in pool if alike(other)]
    same = [other for other in rivals if other.module == line.module]
    others = [other for other in rivals if other.module != line.module]
    sources = (same, others, others)
    chosen: list[str] = []
    for source in sources:
        fresh = sorted({other.text for other in source} - {line.text, *chosen})
        if not fresh:
            return None
        chosen.append(draw.choice(fresh))
    return chosen


def next_line(modules: dict[str, str]) -> list[Row]:
    """Multiple-choice items, each true line used once."""
    draw = random.Random(SEED)
    pool = [line for module, text in modules.items() for line in code_lines(module, text)]
    order = draw.sample(pool, len(pool))
    rows: list[Row] = []
    seen: set[str] = set()
    for line in order:
        before = modules[line.module].splitlines(keepends=True)[: line.number - 1]
        text = "".join(before)
        if line.text.strip() in seen or len(text) < CONTEXT_CHARACTERS[1] or not before[-1].strip():
            continue
        context = context_before(text, len(text), draw.randint(CONTEXT_CHARACTERS[0], 320))
        wrong = distractors(line, pool, context, draw)
        if wrong is None or len(context) > CONTEXT_CHARACTERS[1] or line.text in context:
            continue
        choices = draw.sample([line.text, *wrong], 4)
        rows.append(
            {
                "module": line.module,
                "line": line.number,
                "context": context,
                "choices": [choice + "\n" for choice in choices],
                "answer": choices.index(line.text),
            }
        )
        seen.add(line.text.strip())
        if len(rows) == NEXT_LINE_ITEMS:
            return rows
    raise ValueError(f"only {len(rows)} next-line items could be built; {NEXT_LINE_ITEMS} are wanted")


def identifier_cuts(text: str) -> Iterator[tuple[int, str]]:
    """Offset just before the mark that leads to an identifier of the code, and the identifier."""
    starts = [0]
    for raw in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(raw))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        offset = starts[token.start[0] - 1] + token.start[1]
        led = re.search(r"\S[ .(\[]$", text[max(0, offset - 2) : offset])
        if token.type == tokenize.NAME and not keyword.iskeyword(token.string) and 3 <= len(token.string) <= 16 and led:
            yield offset - 1, token.string


def bracket_cuts(module: str, text: str) -> Iterator[tuple[int, str]]:
    """Offset of each run of two or more closing brackets in a line of code, and the run."""
    numbers = {line.number for line in code_lines(module, text)}
    offset = 0
    for number, raw in enumerate(text.splitlines(keepends=True), 1):
        if number in numbers and "#" not in raw:
            for run in re.finditer(r"(?<=[\w'\"])[)\]}]{2,}", raw):
                yield offset + run.start(), run.group()
        offset += len(raw)


def seen_before(text: str, context: str, offset: int, target: str) -> bool:
    """Whether the context shows the target after the same word and mark as at `offset`, so that it can be inferred."""
    word = re.search(r"\w{3,}$", context)
    return word is not None and re.search(rf"\b{re.escape(word.group() + text[offset])}{target}\b", context) is not None


def cloze(modules: dict[str, str]) -> list[Row]:
    """Items answered by generation; no identifier makes up more than a twentieth of them."""
    draw = random.Random(SEED + 1)
    cuts = {
        "identifier": [(name, *cut) for name, text in modules.items() for cut in identifier_cuts(text)],
        "brackets": [(name, *cut) for name, text in modules.items() for cut in bracket_cuts(name, text)],
    }
    rows: list[Row] = []
    for kind, wanted in (("identifier", CLOZE_IDENTIFIERS), ("brackets", CLOZE_BRACKETS)):
        taken: dict[str, int] = {}
        found: list[Row] = []
        for module, offset, target in draw.sample(cuts[kind], len(cuts[kind])):
            text = modules[module]
            context = context_before(text, offset, draw.randint(CLOZE_CHARACTERS[0], 320))
            fits = CLOZE_CHARACTERS[0] <= len(context) <= CLOZE_CHARACTERS[1]
            rare = kind == "brackets" or taken.get(target, 0) < wanted // 20
            if fits and rare and (kind == "brackets" or seen_before(text, context, offset, target)):
                taken[target] = taken.get(target, 0) + 1
                found.append({"module": module, "kind": kind, "context": context, "target": target})
            if len(found) == wanted:
                break
        else:
            raise ValueError(f"only {len(found)} cloze items of kind {kind} could be built; {wanted} are wanted")
        rows += found
    return draw.sample(rows, len(rows))


def build(modules: dict[str, str]) -> dict[str, list[Row]]:
    """The rows of each data file, by file name."""
    whole = [row for module, text in modules.items() for row in documents(module, text)]
    return {
        "perplexity.jsonl": random.Random(SEED + 2).sample(whole, len(whole)),
        "next_line.jsonl": next_line(modules),
        "cloze.jsonl": cloze(modules),
    }


def copy_modules(folder: Path = HELD_OUT) -> None:
    """Renew the copies of the held-out modules, and their licence, from the running interpreter."""
    from optimizer.evals.reference.corpus import held_out_files, stdlib

    (folder / "modules").mkdir(parents=True, exist_ok=True)
    for path in held_out_files():
        shutil.copyfile(path, folder / "modules" / f"{path.name}.txt")
    shutil.copyfile(stdlib() / "LICENSE.txt", folder / "PSF-LICENSE.txt")


def write(folder: Path = HELD_OUT) -> None:
    """Build every data file from the copied modules in `folder`."""
    for name, rows in build(read_modules(folder)).items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copy", action="store_true", help="renew the module copies from the running interpreter")
    if parser.parse_args().copy:
        copy_modules()
    write()
