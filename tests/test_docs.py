"""Every fenced block of the documentation is run, and what is promised below it is compared.

``python`` blocks run in one process each; ``bash`` blocks run with ``bash -e`` and the virtual environment's programs,
where ``prefs.jsonl`` and a tiny model ``./tiny`` lie; ``yaml`` blocks are resolved as configurations. A ``text`` block
under ``<!-- output -->`` is what the block before it prints. ``<!-- not run: REASON -->`` above a block skips it; the
blocks that may be skipped are listed here. A block without a language is prose.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tiny_folder import feedback_file, tiny_folder
from trimtab.config import resolve

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("python", "bash", "sh", "yaml", "text", "")
SKIPPED = re.compile(r"<!--\s*not run:\s*(\S.*?)\s*-->")
OUTPUT = re.compile(r"<!--\s*output\s*-->")
# what a block may hold that is not run: commands that make an environment, or that train for minutes
LONG = re.compile(
    r"(make \w+|(\S+/)?python3? (-m )?benchmarks\S*( .*)?|trimtab (demo|compare)( .*)?|git clone .*|cd .*|#.*)\s*(#.*)?"
)


@dataclass(frozen=True)
class Block:
    """One fenced block: where it is, its language, its text, and what the comment above and the block below it say."""

    page: Path
    line: int
    language: str
    text: str
    skipped: str = ""
    output: str | None = None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in order, expected outputs attached to the blocks that print them."""
    found: list[Block] = []
    above, fence, start, inside = "", "", 0, list[str]()
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        mark = re.match(r"\s*(`{3,})\s*(\S*)", line)
        if not fence and mark:
            fence, language, start, inside = mark[1], mark[2], number, []
        elif fence and line.strip() == fence:
            text, fence = "\n".join(inside) + "\n", ""
            if OUTPUT.fullmatch(above):
                assert language == "text", f"{page}:{start}: an output is a text block"
                assert found and found[-1].output is None, f"{page}:{start}: there is nothing above that prints this"
                last = found.pop()
                found.append(Block(last.page, last.line, last.language, last.text, last.skipped, text))
            else:
                skipped = SKIPPED.fullmatch(above)
                found.append(Block(page, start, language, text, skipped[1] if skipped else ""))
            above = ""
        elif fence:
            inside.append(line)
        elif line.strip():
            above = line.strip()
    assert not fence, f"{page}:{start}: the block is not closed"
    return found


ALL = [block for page in PAGES for block in blocks(page)]
RUN = [block for block in ALL if not block.skipped]


def of(*languages: str) -> list[Block]:
    return [block for block in RUN if block.language in languages]


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    tiny_folder(folder / "tiny")
    feedback_file(folder / "prefs.jsonl", "comparison", 24)
    return folder


@pytest.fixture(scope="module")
def places(materials: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """One working folder per page, so that a block may use what the blocks above it left."""
    found = {page: tmp_path_factory.mktemp(page.stem) for page in PAGES}
    for place in found.values():
        shutil.copytree(materials, place, dirs_exist_ok=True)
    return found


def execute(words: list[str], place: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }
    return subprocess.run(words, cwd=place, env=environment, text=True, capture_output=True, timeout=120)


def compared(block: Block, told: str) -> None:
    if block.output is not None:
        assert told.rstrip().splitlines() == block.output.rstrip().splitlines(), f"{block} prints something else"


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_python(block: Block, places: dict[Path, Path]) -> None:
    script = places[block.page] / f"block_{block.line}.py"  # a file, because dataclasses look for their source
    script.write_text(block.text)
    found = execute([sys.executable, "-W", "error", str(script)], places[block.page])
    assert found.returncode == 0, f"{block}\n{found.stderr}"
    compared(block, found.stdout)


@pytest.mark.parametrize("block", of("bash", "sh"), ids=str)
def test_shell(block: Block, places: dict[Path, Path]) -> None:
    found = execute(["bash", "-e", "-o", "pipefail", "-c", block.text], places[block.page])
    assert found.returncode == 0, f"{block}\n{found.stdout}\n{found.stderr}"
    compared(block, found.stdout)


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_yaml(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(block.text)
    resolve({} if "data:" in block.text else {"data": "prefs.jsonl"}, str(file))


def test_every_block_is_accounted_for() -> None:
    """A language that no test runs, and a block that is skipped without being long, would be documentation on trust."""
    for block in ALL:
        assert block.language in LANGUAGES, f'{block}: no test runs "{block.language}" blocks'
        if block.language == "text":
            assert not block.skipped
        if block.output is not None:
            assert block.language in ("python", "bash", "sh") and not block.skipped, (
                f"{block} has an output but is not run"
            )
    for block in ALL:
        if block.skipped:
            short = [line for line in block.text.splitlines() if line.strip() and not LONG.fullmatch(line.strip())]
            assert not short, f"{block} is not run ({block.skipped}), but this is not long: {short[0]}"


def test_the_blocks_that_are_not_run() -> None:
    """Exactly these; a new one must be added here on purpose."""
    found = {(block.page.name, block.text.split("#")[0].split("\n")[0].strip()) for block in ALL if block.skipped}
    assert found == NOT_RUN


NOT_RUN = {
    ("README.md", "make demo"),
    *((page, "trimtab compare --methods dpo,kto,simpo --seeds 5") for page in ("README.md", "controlled_world.md")),
}


def test_every_page_is_read() -> None:
    assert {p.name for p in PAGES} >= {"README.md", "CONTRIBUTING.md"} and all(p.is_file() for p in PAGES)
    assert of("python") and of("bash", "sh") and of("yaml")


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if not re.match(r"[a-z]+:", target):
                assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


# --- the test of the test ---------------------------------------------------------------------------------------------


def written(tmp_path: Path, text: str) -> list[Block]:
    page = tmp_path / "page.md"
    page.write_text(text)
    return blocks(page)


def test_blocks_are_found(tmp_path: Path) -> None:
    text = "a\n```python\nprint(1)\n```\n\n<!-- output -->\n```text\n1\n```\n\n<!-- not run: slow -->\n```bash\nmake demo\n```\n"
    one, two = written(tmp_path, text + "\n````\n```python\nnot code\n```\n````\n")[:2]
    assert (one.language, one.line, one.text, one.output, one.skipped) == ("python", 2, "print(1)\n", "1\n", "")
    assert (two.language, two.skipped, two.output) == ("bash", "slow", None)
    assert [b.language for b in written(tmp_path, "````\n```python\nnot code\n```\n````\n")] == [""]


@pytest.mark.parametrize(
    "text", ["```python\nx\n", "<!-- output -->\n```text\n1\n```\n", "```sh\nx\n```\n<!-- output -->\n```sh\n1\n```\n"]
)
def test_broken_pages_are_noticed(tmp_path: Path, text: str) -> None:
    with pytest.raises(AssertionError):
        written(tmp_path, text)


def test_a_wrong_output_is_noticed(tmp_path: Path) -> None:
    (block,) = written(tmp_path, "```sh\necho 1\n```\n<!-- output -->\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match="prints something else"):
        compared(block, execute(["bash", "-c", block.text], tmp_path).stdout)
