"""The house rules: who imports whom, what stays light and short, and that what is written down exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glassgpt.config import PRESETS, Pretrain, UserError
from glassgpt.config.files import read_yaml

LAYERS = (
    "config", "charts", "text", "data", "model", "loading", "gguf_writer",
    "exporting", "generation", "interpret", "evaluation", "train", "tuning", "compress",
    "retrieve", "lab", "serve", "cli",
)  # fmt: skip
ONLY_CONFIG = ("text", "model")  # these know of nothing else
FAMILY = re.compile(r"(distil)?gpt[-_]?(\d|neo)|bloom|llama|mi[sx]tral|qwen|gemma|deepseek|neox|falcon|\bphi\b", re.IGNORECASE)


# ---------------------------------------------------------------------- imports


def imported_layers(source: str, package: str) -> set[str]:
    """Layers of glassgpt that a module imports anywhere, in functions too. `package` is the module's own."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            start = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "glassgpt" else [base]
        found |= {name.split(".")[1] for name in names if name.startswith("glassgpt.")}
    return found


def wrong_imports(folder: Path) -> list[str]:
    """Every import in a package `folder` that goes up the list of layers."""
    wrong = []
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        layer = inside.parts[0].removesuffix(".py")
        if layer in ("__init__", "__main__"):
            continue  # the public API, loaded late, and the way in: above everything
        if layer not in LAYERS:
            wrong.append(f"{inside}: {layer} is in no layer; give it a place in LAYERS")
            continue
        allowed = {"config"} if layer in ONLY_CONFIG else set(LAYERS[: LAYERS.index(layer)])
        package = ".".join(["glassgpt", *inside.parts[:-1]])
        seen = imported_layers(path.read_text(encoding="utf-8"), package) - {layer}
        wrong += [f"{inside} imports {name}" for name in sorted(seen & set(LAYERS) - allowed)]
    return wrong


def test_imports_go_down_the_layers(root: Path) -> None:
    assert wrong_imports(root / "glassgpt") == []


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("model/a.py", "from glassgpt.text import Tokenizer", "model/a.py imports text"),
        ("model/a.py", "import glassgpt.data.shards as s", "model/a.py imports data"),
        ("data/a.py", "def f():\n    from glassgpt import config, train", "data/a.py imports train"),
        ("text/a.py", "from ..model import gpt", "text/a.py imports model"),
        ("data/deep/a.py", "from ...model import gpt", "data/deep/a.py imports model"),
        ("loading.py", "if 0:\n    import glassgpt.cli", "loading.py imports cli"),
        ("extra/a.py", "", "extra/a.py: extra is in no layer; give it a place in LAYERS"),
        ("train/a.py", "from glassgpt.model import GPT\nfrom glassgpt import data\nfrom .loss import x", None),
        ("model/a.py", "from .gpt import GPT\nfrom . import weights\nfrom glassgpt.config import ModelConfig", None),
    ],
)
def test_the_import_check_sees_wrong_imports(tmp_path: Path, file: str, source: str, expected: str | None) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(source)
    assert wrong_imports(tmp_path) == ([] if expected is None else [expected])


def test_config_loads_no_torch(root: Path, start_python: Any) -> None:
    names = [f"glassgpt.config.{path.stem}" for path in sorted((root / "glassgpt" / "config").glob("[!_]*.py"))]
    assert "glassgpt.config.files" in names
    code = f"import sys, {', '.join(names)}; print([name for name in sys.modules if name == 'torch'])"
    out, errors = start_python(code).communicate(timeout=60)
    assert (out.strip(), errors) == ("[]", "")


# ---------------------------------------------------------------------- the model


def model_files(root: Path) -> list[Path]:
    files = sorted((root / "glassgpt" / "model").glob("*.py"))
    assert any(path.name == "gpt.py" for path in files)
    return files


def published_names(source: str) -> list[str]:
    """Names of published models in code: identifiers and strings, but not comments or docstrings."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body and isinstance(node.body[0], ast.Expr)
    }  # fmt: skip
    words: list[str | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            words.append(node.value)
        words += [getattr(node, field, None) for field in ("id", "attr", "name", "arg", "module")]
    return [word for word in words if isinstance(word, str) and FAMILY.search(word)]


def test_no_published_name_decides_anything_in_the_model(root: Path) -> None:
    for path in model_files(root):
        if path.name != "families.py":  # the one place that maps published checkpoints
            assert published_names(path.read_text(encoding="utf-8")) == [], path


def test_the_name_check_sees_names() -> None:
    assert all(FAMILY.search(name) for name in PRESETS if name[:3] == "gpt" or name.startswith("distil"))
    for code in ("if a.name == 'gpt2-xl': pass", "is_llama = 1", "x.gpt2_mode()", "def f(gemma): pass", "class Qwen3: pass"):
        assert len(published_names(code)) == 1, code
    assert published_names('"""GPT-2 as published."""\nclass GPT:\n    """Like gpt2."""\n# llama\nx = "alpha"') == []


def forward_functions(root: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in model_files(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name == "forward":
                yield f"{path.name}:{node.lineno}", node


def branches(function: ast.FunctionDef) -> int:
    kinds = (ast.If, ast.IfExp, ast.match_case, ast.While, ast.Try)
    return sum(isinstance(node, kinds) for node in ast.walk(function))


def test_forward_functions_stay_short(root: Path) -> None:
    functions = list(forward_functions(root))
    assert len(functions) >= 4
    for where, function in functions:
        assert (function.end_lineno or 0) - function.lineno + 1 <= 30, where
        assert branches(function) <= 3, where


def test_branches_are_counted() -> None:
    code = "def forward(x):\n if x: y = 1 if x else 2\n elif x > 1: pass\n for i in x: pass\n while x: pass"
    function = ast.parse(code).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert branches(function) == 4


# ---------------------------------------------------------------------- what is written down

COMMANDS = {"pretrain": Pretrain}  # commands that have recipes


def test_every_recipe_parses(root: Path) -> None:
    recipes = sorted((root / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        command = re.search(r"^#.*glassgpt (\S+) --config (\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert command, f"{path.name}: a comment must say how to run it: glassgpt COMMAND --config recipes/{path.name}"
        assert command[2] == f"recipes/{path.name}"
        assert command[1] in COMMANDS, f"{path.name}: add {command[1]} to COMMANDS"
        read_yaml(path, COMMANDS[command[1]])


def test_a_wrong_recipe_is_noticed(root: Path, tmp_path: Path) -> None:
    recipe = (root / "recipes" / "storyteller.yaml").read_text(encoding="utf-8")
    (tmp_path / "wrong.yaml").write_text(recipe.replace("max_steps", "max_stebs"))
    with pytest.raises(UserError, match="did you mean 'max_steps'"):
        read_yaml(tmp_path / "wrong.yaml", Pretrain)


def paths_in(text: str) -> set[str]:
    """Files and folders of this repository that a page names, in links, in backticks or in commands."""
    top = r"(?:glassgpt|tests|docs|recipes|notebooks|\.github)/[\w./-]*\w/?|(?<![\w/.-])[A-Z][\w.]*\.md"
    links = {target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target}
    text = re.sub(r"\w+://\S+", "", text)
    return set(re.findall(rf"(?<![\w/.-])(?:{top})", text)) | {link for link in links if link}


def test_every_path_that_a_page_names_exists(root: Path) -> None:
    pages = [*root.glob("*.md"), *(root / "docs").glob("**/*.md")]
    missing = [
        f"{page.relative_to(root)}: {name}"
        for page in pages
        for name in sorted(paths_in(page.read_text(encoding="utf-8")))
        if not (root / name).exists() and not (page.parent / name).exists()
    ]
    assert missing == []


def test_paths_are_found_in_pages() -> None:
    page = """See [the log](log.md#a) and `glassgpt/model/gpt.py`; run `glassgpt pretrain --config recipes/x.yaml`, docs/a.md.
    [web](https://github.com/x/docs/b.md) https://a.b/tests/c.py README.vi.md and runs/x/config.yaml, glassgpt/text/."""
    expected = {"log.md", "glassgpt/model/gpt.py", "recipes/x.yaml", "docs/a.md", "README.vi.md", "glassgpt/text/"}
    assert paths_in(page) == expected


def skip_reasons(source: str) -> Iterator[str]:
    """The reason of every skip in a test file, up to its first colon; '' where none is written out."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".skip", ".skipif", ".importorskip")):
            strings = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            yield next((string.split(":")[0] for string in strings if isinstance(string, str)), "")


def test_every_skip_has_a_row(root: Path) -> None:
    table = (root / "tests" / "SKIPS.md").read_text(encoding="utf-8")
    sources = [(path.name, path.read_text(encoding="utf-8")) for path in sorted((root / "tests").rglob("*.py"))]
    reasons = [(name, reason) for name, source in sources for reason in skip_reasons(source)]
    assert ("conftest.py", "shared data folder not found") in reasons
    assert [(name, reason) for name, reason in reasons if not reason or reason not in table] == []


def test_skips_are_found() -> None:
    code = "pytest.skip(f'no such thing: {path}')\n@pytest.mark.skipif(a == 1, reason='no GPU')\ndef f(): pytest.skip()"
    assert sorted(skip_reasons(code)) == ["", "no GPU", "no such thing"]
