"""Imports point one way, files stay short, and no name is a drawer for everything.

The rules are read off the syntax tree of every file: an import inside a function or
under `TYPE_CHECKING` counts. What a rule allows holds for a module and all below it;
the longest matching entry is the one that binds.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TREES = ("deepseek_jax", "kernels_pallas", "experiments", "tests")
MAX_LINES = 400
BAD_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "manager"}

_ABOVE = ("deepseek_jax", "kernels_pallas")
# module: what it may import of our own (besides itself and what lies below it)
MAY_IMPORT = {
  "kernels_pallas": (),
  "deepseek_jax": (),
  "deepseek_jax.presets": ("deepseek_jax.config",),
  "deepseek_jax.processes": ("deepseek_jax.last_words", "deepseek_jax.meeting"),
  "deepseek_jax.planner": ("deepseek_jax.config", "deepseek_jax.parallel.schedule"),
  "deepseek_jax.config": (
    "deepseek_jax.checkpoint_config",
    "deepseek_jax.fp8_config",
    "deepseek_jax.rebalance_config",
  ),
  "deepseek_jax.precision": ("deepseek_jax.fp8_config", "kernels_pallas"),
  "deepseek_jax.parallel": ("deepseek_jax.mesh", "kernels_pallas"),
  "deepseek_jax.parallel.schedule": (),
  "deepseek_jax.model": (
    "deepseek_jax.config",
    "deepseek_jax.dense_config",
    "deepseek_jax.mesh",
    "deepseek_jax.parallel.decode_dispatch",
    "deepseek_jax.parallel.dispatch",
    "deepseek_jax.parallel.places",
    "deepseek_jax.precision",
    "kernels_pallas",
  ),
  "deepseek_jax.train": _ABOVE,
  "deepseek_jax.infer": _ABOVE,
  "deepseek_jax.post": _ABOVE,
  "deepseek_jax.io": _ABOVE,
  "deepseek_jax.data": _ABOVE,
  "experiments": _ABOVE,
  "tests": (*_ABOVE, "experiments"),
}
# module: the only packages of others that it may import
ONLY_PACKAGES = {"kernels_pallas": {"jax", "numpy"}}
# No JAX here, nor in anything that these import.
WITHOUT_JAX = (
  "deepseek_jax.config",
  "deepseek_jax.dense_config",
  "deepseek_jax.presets",
  "deepseek_jax.parallel.eplb",
  "deepseek_jax.parallel.schedule",
  "deepseek_jax.planner",
)
JAX_PACKAGES = {"jax", "jaxlib", "flax", "optax", "orbax", "chex", "grain"}
COMMAND_LINE_PACKAGES = {"absl", "ml_collections"}
MAY_SEE_COMMAND_LINE = ("experiments", "tests")

Imports = dict[str, set[str]]  # module -> modules that it imports


def read_tree(root: Path) -> dict[str, Path]:
  """Every module below the trees of `root`, by its dotted name."""
  modules = {}
  for tree in TREES:
    for path in sorted((root / tree).rglob("*.py")):
      parts = path.relative_to(root).with_suffix("").parts
      modules[".".join(p for p in parts if p != "__init__")] = path
  return modules


def read_imports(modules: dict[str, Path]) -> Imports:
  """What each module imports: our modules by full name, others by package."""
  imports: Imports = {}
  for name, path in modules.items():
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    imports[name] = set()
    for target in _targets(ast.parse(path.read_text("utf-8")), package, modules):
      ours = target.split(".")[0] in TREES
      imports[name].add(target if ours else target.split(".")[0])
    imports[name].discard(name)
  return imports


def _targets(tree: ast.AST, package: str, modules: dict[str, Path]) -> Iterator[str]:
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      source = node.module or ""
      if node.level:
        above = package.split(".")[: len(package.split(".")) - node.level + 1]
        source = ".".join([*above, *([source] if source else [])])
      for alias in node.names:
        below = f"{source}.{alias.name}"
        yield below if below in modules else source


def _within(module: str, prefix: str) -> bool:
  return module == prefix or module.startswith(prefix + ".")


def _rule(module: str, rules: dict) -> str | None:
  """The key of `rules` that binds `module`."""
  return max((key for key in rules if _within(module, key)), key=len, default=None)


def _ours(imports: set[str]) -> list[str]:
  return sorted(name for name in imports if name.split(".")[0] in TREES)


def check_direction(imports: Imports) -> Iterator[str]:
  for module, targets in imports.items():
    rule = _rule(module, MAY_IMPORT)
    assert rule is not None
    home = module if rule == "deepseek_jax" else rule
    for target in _ours(targets):
      allowed = (*MAY_IMPORT[rule], home)
      if not any(_within(target, prefix) for prefix in allowed):
        yield f"{module} imports {target}; it may import {', '.join(allowed)}"


def check_packages(imports: Imports) -> Iterator[str]:
  for module, targets in imports.items():
    others = {name for name in targets if name.split(".")[0] not in TREES}
    others -= sys.stdlib_module_names
    rule = _rule(module, ONLY_PACKAGES)
    for package in sorted(others - ONLY_PACKAGES.get(rule or "", others)):
      yield f"{module} imports {package}; {rule} may not"
    if not any(_within(module, tree) for tree in MAY_SEE_COMMAND_LINE):
      for package in sorted(others & COMMAND_LINE_PACKAGES):
        yield f"{module} imports {package}; only experiments may"


def check_without_jax(imports: Imports) -> Iterator[str]:
  for module in imports:
    if any(_within(module, prefix) for prefix in WITHOUT_JAX):
      chain = _way_to_jax(module, imports)
      if chain:
        yield f"{module} reaches JAX: {' -> '.join(chain)}"


def _way_to_jax(start: str, imports: Imports) -> list[str] | None:
  """A chain of imports from `start` to JAX; importing a module runs its parents."""
  frontier, seen = [[start]], {start}
  while frontier:
    chain = frontier.pop(0)
    parts = chain[-1].split(".")
    parents = {".".join(parts[:n]) for n in range(1, len(parts))}
    for target in sorted(imports.get(chain[-1], set()) | parents):
      if target in JAX_PACKAGES:
        return [*chain, target]
      if target in imports and target not in seen:
        seen.add(target)
        frontier.append([*chain, target])
  return None


def check_cycles(imports: Imports) -> Iterator[str]:
  done: set[str] = set()

  def visit(module: str, trail: list[str]) -> Iterator[str]:
    if module in trail:
      yield f"a cycle: {' -> '.join([*trail[trail.index(module) :], module])}"
    elif module not in done:
      for target in _ours(imports.get(module, set())):
        yield from visit(target, [*trail, module])
      done.add(module)

  for module in imports:
    yield from visit(module, [])


def check_files(modules: dict[str, Path]) -> Iterator[str]:
  for module, path in modules.items():
    lines = len(path.read_text("utf-8").splitlines())
    if lines > MAX_LINES:
      yield f"{module} has {lines} lines; at most {MAX_LINES}"
    bad = BAD_NAMES & {w for part in module.split(".") for w in part.split("_")}
    if bad:
      yield f"{module}: {', '.join(sorted(bad))} says nothing about what is in it"


def check_tree(root: Path) -> list[str]:
  modules = read_tree(root)
  imports = read_imports(modules)
  rules = (check_direction, check_packages, check_without_jax, check_cycles)
  return [line for rule in rules for line in rule(imports)] + [*check_files(modules)]


def test_our_tree_keeps_the_rules():
  modules = read_tree(ROOT)
  assert {"deepseek_jax.config", "deepseek_jax.model.transformer"} <= set(modules)
  assert check_tree(ROOT) == []


VIOLATIONS = {
  "the model knows the training": (
    "deepseek_jax/model/moe.py",
    "from deepseek_jax.train import loss",
    "deepseek_jax.model.moe imports deepseek_jax.train",
  ),
  "the model knows all of parallel": (
    "deepseek_jax/model/moe.py",
    "import deepseek_jax.parallel.pipeline",
    "deepseek_jax.model.moe imports deepseek_jax.parallel.pipeline",
  ),
  "the pipeline knows the model": (
    "deepseek_jax/parallel/pipeline.py",
    "from ..model import moe",
    "deepseek_jax.parallel.pipeline imports deepseek_jax.model.moe",
  ),
  "somebody imports experiments": (
    "deepseek_jax/train/loop.py",
    "def f():\n  from experiments import run",
    "deepseek_jax.train.loop imports experiments",
  ),
  "a kernel imports flax": (
    "kernels_pallas/matmul/gpu.py",
    "import flax.nnx",
    "kernels_pallas.matmul.gpu imports flax",
  ),
  "a kernel imports the package": (
    "kernels_pallas/matmul/gpu.py",
    "from deepseek_jax import config",
    "kernels_pallas.matmul.gpu imports deepseek_jax.config",
  ),
  "flags below experiments": (
    "deepseek_jax/train/loop.py",
    "from absl import flags",
    "deepseek_jax.train.loop imports absl",
  ),
  "config imports jax": (
    "deepseek_jax/config.py",
    "import jax.numpy as jnp",
    "deepseek_jax.config reaches JAX: deepseek_jax.config -> jax",
  ),
  "a parent package imports jax": (
    "deepseek_jax/__init__.py",
    "import jax",
    "deepseek_jax.config reaches JAX: deepseek_jax.config -> deepseek_jax -> jax",
  ),
  "the schedule imports anything of ours": (
    "deepseek_jax/parallel/schedule.py",
    "from deepseek_jax import config",
    "deepseek_jax.parallel.schedule imports deepseek_jax.config",
  ),
  "a cycle": (
    "deepseek_jax/model/moe.py",
    "from deepseek_jax.model import router",
    "a cycle: deepseek_jax.model.moe -> deepseek_jax.model.router",
  ),
  "a long file": ("deepseek_jax/model/moe.py", "x = 1\n" * 401, "has 401 lines"),
  "a drawer": ("deepseek_jax/model/moe_utils.py", "", "utils says nothing"),
}


@pytest.fixture
def tidy_tree(tmp_path: Path) -> Path:
  files = {
    "deepseek_jax/__init__.py": "",
    "deepseek_jax/config.py": "import dataclasses",
    "deepseek_jax/mesh.py": "import jax",
    "deepseek_jax/model/moe.py": "import jax\nfrom kernels_pallas import matmul",
    "deepseek_jax/model/router.py": "from deepseek_jax.model import moe",
    "deepseek_jax/parallel/schedule.py": "import math",
    "deepseek_jax/parallel/pipeline.py": "from deepseek_jax.parallel import schedule",
    "deepseek_jax/train/loop.py": "from ..model.moe import MoE",
    "deepseek_jax/train/loss.py": "import jax",
    "kernels_pallas/matmul/__init__.py": "import jax\nfrom . import gpu",
    "kernels_pallas/matmul/gpu.py": "import numpy as np",
    "experiments/run.py": "from absl import app\nfrom deepseek_jax.train import loop",
  }
  for name, text in files.items():
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return tmp_path


def test_a_tidy_tree_passes(tidy_tree: Path):
  assert check_tree(tidy_tree) == []


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_is_found(tidy_tree: Path, name: str):
  file, text, complaint = VIOLATIONS[name]
  (tidy_tree / file).write_text(text)
  assert any(complaint in line for line in check_tree(tidy_tree))
