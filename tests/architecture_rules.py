"""The rules of the layout with teeth: import arrows, one home per constant, names, sizes, no unsafe loading.

Each rule is a plain function from one source file to a list of complaints. Rules read the AST and the comments; only
the catalogue is imported, for the names to look for. `test_architecture.py` runs them over every file of the
repository, and over small sources that break them. Where a file is tested is in `test_mirror.py`.

The rooms of `qat`, every arrow an import (`errors` and `config` from anywhere, left out):

    numbers  <-  training  <-  serving          a number, its gradient, its place in memory; none knows a model
       ^            ^
       |            |
    quantizer  <-  sites  <-  adapters          one quantizer; what of a model can be quantized; module classes
       ^            ^
       |            |
      init  ------- +  <-  scheme  <-  surgery  what happens before step 1; the rules; putting it together

    No arrow goes back.
"""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from qat.numbers.catalog import CATALOG

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("kernels", "trainers", "checkpoints", "engines", "configs")
FOLDERS = ("qat", *LINKED, "tests")

# A layer may import itself and these. The composition roots may import every layer, inside functions only.
MAY_IMPORT = {
    "qat": {"qat"},
    "kernels": {"qat", "kernels"},
    "checkpoints": {"qat", "checkpoints"},
    "engines": {"qat", "kernels", "checkpoints", "engines"},
    "trainers": {"qat", "checkpoints", "trainers"},
    "configs": set(),
}
COMPOSITION_ROOTS = ("qat/__init__.py", "qat/cli.py")
OPTIONAL = {"wandb", "tensorboard", "deepspeed", "lm_eval"}
CORE_BANS = {"transformers", "lightning", "pytorch_lightning", "datasets", "peft", "triton", *OPTIONAL}

# A folder of qat may import itself and these; a file directly in qat/ those of its row, if it has one.
ANYWHERE = {"errors", "config"}
ROOMS = {
    "numbers": set(),
    "training": {"numbers"},
    "serving": {"numbers", "training"},
    "init": {"numbers", "quantizer", "same_tensor", "sites", "modes", "families", "sharded"},
    "adapters": {"numbers", "training", "quantizer", "folding", "sites"},
    "folding": {"training", "quantizer"},
    "errors": set(),
    "config": set(),
    "families": set(),
    "observers": {"numbers"},
    "same_tensor": set(),
    "quantizer": {"numbers", "training", "observers", "same_tensor"},
    "sites": {"numbers", "quantizer"},
    "modes": {"quantizer", "sites", "float32", "sharded"},
    "sharded": {"quantizer", "sites", "zero"},
    "zero": set(),
    "float32": {"quantizer", "training"},
    "sensitivity": {"modes", "sites"},
    "fallback": {"numbers", "sensitivity"},
    "scheme": {"numbers", "training", "init", "observers", "quantizer", "sites", "families", "fallback"},
    "lora": {"training", "adapters", "sites", "text", "serving"},
    "surgery": {"numbers", "init", "adapters", "quantizer", "sites", "families", "scheme"},
}

# Who may ask for a module class outside the adapters, and why.
MODULE_CLASSES = {"Linear", "Embedding", "Conv1D", "QatLinear", "QatEmbedding", "QatConv1D", "QatExperts"}
NAMES_CLASSES = {
    "qat/init/smooth.py": "a scale moves from a norm into the linear layers that read it: the pair is the method",
    "qat/init/permute.py": "values change places between the two linear layers around attention",
    "qat/training/heads.py": "the loss multiplies with the head chunk by chunk instead of calling it",
    "checkpoints/names.py": "which names of a file are layers is asked before anything is quantized",
    "checkpoints/positions.py": "a table of positions says how long a text may be",
    "checkpoints/wrapped.py": "peft's class of that name, which holds factors of an update",
    "trainers/logitcache.py": "a teacher's output layer comes back from the disk as the layer it was",
    "engines/tables.py": "replaces embeddings and heads of a model that was never quantized by `qat.apply`",
    "engines/transformers.py": "replaces layers of a model that was never quantized by `qat.apply`",
}

CONSTANT_HOMES = ("qat/numbers/catalog.py", "qat/numbers/element.py")
FORMAT_NUMBERS = {448, 2688, 127, 127.5, 240, 57344, 7.5}
FORMAT_NAMES = frozenset(CATALOG)

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
VAGUE_NAMES = {"utils", "util", "helpers", "common", "base", "misc"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
SILENCE = re.compile(r"#\s*(?:ruff:\s*)?(?:(?:type|pyright):\s*ignore|noqa)", re.IGNORECASE)
CODED_TYPE = r"(?:type|pyright):\s*ignore\[[\w\-, ]+\]"
CODED_NOQA = r"(?:ruff:\s*)?noqa:\s*[A-Z]+\d+(?:,\s*[A-Z]+\d+)*"
CODED_SILENCE = re.compile(rf"#\s*(?:{CODED_TYPE}|{CODED_NOQA})", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """One Python file: its path from the repository root (the real folder, never a link) and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.path)

    @property
    def layer(self) -> str:
        return self.path.partition("/")[0]

    @property
    def module(self) -> list[str]:
        """Package path for relative imports: kernels/a/b.py is qat.kernels.a.b."""
        parts = list(PurePosixPath(self.path).with_suffix("").parts)
        return ["qat", *parts] if self.layer in LINKED else parts


@dataclass(frozen=True)
class Import:
    """One imported dotted name; eager unless it stands in a function or is for type checkers only."""

    name: str
    line: int
    eager: bool

    @property
    def layer(self) -> str | None:
        parts = self.name.split(".")
        if parts[0] != "qat":
            return None
        return parts[1] if len(parts) > 1 and parts[1] in LINKED else "qat"


def sources() -> Iterator[Source]:
    """Every Python file of the repository once: through the real folders, never through qat's links."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT)
            if not (folder == "qat" and relative.parts[1] in LINKED):
                yield Source(relative.as_posix(), path.read_text(encoding="utf-8"))


def imports(source: Source) -> Iterator[Import]:
    """All imports: statements, `from` names, relative ones, and import_module / __import__ of a constant."""

    def visit(node: ast.AST, eager: bool) -> Iterator[Import]:
        for name in _imported_names(source, node):
            yield Import(name, getattr(node, "lineno", 0), eager)
        types_only = isinstance(node, ast.If) and "TYPE_CHECKING" in _dotted(node.test)
        inner = eager and not types_only and not isinstance(node, FUNCTIONS)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    yield from visit(source.tree, True)


def _imported_names(source: Source, node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parent = source.module[: len(source.module) - node.level] if node.level else []
        stem = ".".join([*parent, *([node.module] if node.module else [])])
        return [f"{stem}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and _dotted(node.func).endswith(("import_module", "__import__")):
        return [str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
    return []


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _docstrings(tree: ast.Module) -> set[int]:
    """ids of the constant nodes that are docstrings (or attribute docs: any bare string statement)."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def import_arrows(source: Source) -> list[str]:
    """trainers -> checkpoints -> qat <- kernels, and engines -> checkpoints, kernels; nothing points at those two."""
    if source.layer == "tests":
        return []
    found = []
    for item in imports(source):
        top = item.name.partition(".")[0]
        if top in LINKED:
            found.append(f"{item.line}: imports top-level {top!r}; write qat.{top}")
        elif item.layer and source.path in COMPOSITION_ROOTS:
            if item.layer != "qat" and item.eager:
                found.append(f"{item.line}: import {item.name} inside the function that needs it")
        elif item.layer and item.layer not in MAY_IMPORT[source.layer]:
            found.append(f"{item.line}: {source.layer} must not import {item.name}")
    return found


def rooms(source: Source) -> list[str]:
    """Arrows between the rooms of qat go one way: a number knows no gradient, a gradient no memory, none a model."""
    parts = source.path.removesuffix(".py").split("/")
    if source.layer != "qat" or parts[1] not in ROOMS:
        return []
    allowed = ROOMS[parts[1]] | ANYWHERE | {parts[1]}
    inside = [item for item in imports(source) if item.layer == "qat" and item.name.count(".")]
    rooms_of = [(item, item.name.split(".")[1]) for item in inside]
    return [f"{item.line}: {parts[1]} must not import {item.name}" for item, room in rooms_of if room not in allowed]


def no_module_classes(source: Source) -> list[str]:
    """What is quantized is asked of sites; only adapters know the classes of modules."""
    if source.layer in ("tests", "kernels") or source.path.startswith("qat/adapters/") or source.path in NAMES_CLASSES:
        return []
    nodes = [node for node in ast.walk(source.tree) if isinstance(node, ast.Name | ast.Attribute)]
    return [
        f"{node.lineno}: {name} is for adapters; ask `qat.sites`, or say why in NAMES_CLASSES"
        for node in nodes
        if (name := node.id if isinstance(node, ast.Name) else node.attr) in MODULE_CLASSES
    ]


def light_core(source: Source) -> list[str]:
    """Files directly in qat/ need no heavy library; optional services load only when asked for."""
    found = []
    core = source.layer == "qat" and source.path != "qat/cli.py"
    for item in imports(source):
        top = item.name.partition(".")[0]
        if core and top in CORE_BANS:
            found.append(f"{item.line}: qat core must not import {top}")
        elif source.layer != "tests" and item.eager and top in OPTIONAL:
            found.append(f"{item.line}: {top} is optional; import it inside the function that needs it")
    return found


def one_home_for_constants(source: Source) -> list[str]:
    """An element's limits and a format's name are written in the catalogue, and derived everywhere else."""
    if source.layer == "tests" or source.path in CONSTANT_HOMES:
        return []
    prose = _docstrings(source.tree)
    found = []
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Constant) or id(node) in prose:
            continue
        if type(node.value) in (int, float) and node.value in FORMAT_NUMBERS:
            found.append(f"{node.lineno}: {node.value} belongs to an Element; derive it from the Format")
        elif isinstance(node.value, str) and node.value in FORMAT_NAMES:
            found.append(f"{node.lineno}: format name {node.value!r} belongs in the catalogue or a config")
    return found


def clear_names(source: Source) -> list[str]:
    """A file or folder is named after what it holds."""
    parts = PurePosixPath(source.path).with_suffix("").parts
    return [f"1: {part!r} does not name what it holds" for part in parts if part.strip("_") in VAGUE_NAMES]


def fits_on_a_screen(source: Source) -> list[str]:
    """A module docstring, and few enough lines per file and function (functions in kernels/ are exempt)."""
    found = [] if ast.get_docstring(source.tree) else ["1: no module docstring: what does it own, and why?"]
    lines = len(source.text.splitlines())
    if lines > MAX_FILE_LINES:
        found.append(f"1: {lines} lines; at most {MAX_FILE_LINES}: is it one subject?")
    for node in ast.walk(source.tree):
        if isinstance(node, FUNCTIONS) and source.layer != "kernels":
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{node.lineno}: {node.name} has {length} lines; at most {MAX_FUNCTION_LINES}")
    return found


def reasoned_silence(source: Source) -> list[str]:
    """A silenced warning carries its code and the reason in words, after another `#`."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type != tokenize.COMMENT:
            continue
        silenced, reason = len(SILENCE.findall(token.string)), CODED_SILENCE.sub("", token.string)
        if re.match(r"#\s*mypy:", token.string):
            found.append(f"{token.start[0]}: mypy is configured in pyproject.toml, not per file")
        elif silenced and silenced != len(CODED_SILENCE.findall(token.string)):
            found.append(f"{token.start[0]}: say which code is silenced: {token.string}")
        elif silenced and len(re.findall(r"[A-Za-z]", reason)) < 6:
            found.append(f"{token.start[0]}: say in words why it is silenced: {token.string}")
    return found


def safe_loading(source: Source) -> list[str]:
    """Nothing a checkpoint or a hub repository holds is ever executed."""
    found = [
        f"{item.line}: {item.name} can execute what it loads; use safetensors or JSON"
        for item in imports(source)
        if item.name.partition(".")[0] in PICKLES or item.name == "torch.load"
    ]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            found += [f"{node.lineno}: {problem}" for problem in _unsafe_call(node)]
        found += [f"{line}: trust_remote_code=True" for line in _trusts(node)]
    return found


def _unsafe_call(node: ast.Call) -> Iterator[str]:
    name = _dotted(node.func)
    given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
    if name in ("eval", "exec", "builtins.eval", "builtins.exec"):
        yield f"{name}() runs text as code"
    if name == "torch.load" and given.get("weights_only") is not True:
        yield "torch.load without weights_only=True"
    if given.get("allow_pickle") is True:
        yield "allow_pickle=True"


def _trusts(node: ast.AST) -> Iterator[int]:
    """Lines where trust_remote_code is set to True: a keyword, a dict entry, an assignment or a default."""
    pairs: list[tuple[object, ast.expr | None]] = []
    if isinstance(node, ast.keyword):
        pairs = [(node.arg, node.value)]
    elif isinstance(node, ast.Dict):
        pairs = [(getattr(k, "value", ""), v) for k, v in zip(node.keys, node.values, strict=True)]
    elif isinstance(node, ast.Assign):
        pairs = [(_dotted(target).rpartition(".")[2], node.value) for target in node.targets]
    elif isinstance(node, ast.AnnAssign):
        pairs = [(_dotted(node.target).rpartition(".")[2], node.value)]
    elif isinstance(node, ast.arguments):
        positional = [*node.posonlyargs, *node.args][-len(node.defaults) :] if node.defaults else []
        given = zip([*positional, *node.kwonlyargs], [*node.defaults, *node.kw_defaults], strict=True)
        pairs = [(argument.arg, default) for argument, default in given]
    for name, value in pairs:
        if name == "trust_remote_code" and isinstance(value, ast.Constant) and value.value is True:
            yield value.lineno


def linked_folders(root: Path) -> list[str]:
    """The linked folders are real, are no packages of their own, and reach `qat` through relative links."""
    found = []
    for name in LINKED:
        link, folder = root / "qat" / name, root / name
        if not folder.is_dir() or folder.is_symlink():
            found.append(f"{name}/ must be a real folder")
        if not link.is_symlink() or link.readlink() != Path("..") / name:
            found.append(f"qat/{name} must be a symlink to ../{name}")
        if (folder / "__init__.py").exists():
            found.append(f"{name}/__init__.py would make a top-level package that shadows others; delete it")
    return found


Rule = Callable[[Source], list[str]]
RULES: list[Rule] = [import_arrows, light_core, one_home_for_constants, clear_names, fits_on_a_screen]
RULES += [reasoned_silence, safe_loading, rooms, no_module_classes]
