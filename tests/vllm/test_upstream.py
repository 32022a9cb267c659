"""vLLM's own tests of connectors, and scenarios of ours over their utilities.

Both run in processes of their own, in the folder where `scripts/vllm-tests` has laid out vLLM's
tests, because the package of those is called `tests`, like ours.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

from .support import vllm_version
from .upstream import opt

UPSTREAM = Path(sys.prefix) / "upstream"
NEWER = UPSTREAM / vllm_version()
"""The tests of a version of which only the code is there, on PYTHONPATH."""
WORK = NEWER if NEWER.is_dir() else UPSTREAM
SCENARIOS = Path(__file__).parent / "upstream"
RUN_S = 1800.0
CASE_S = 180

pytestmark = pytest.mark.skipif(
    not (UPSTREAM / "stamp").exists(), reason="vLLM's tests are not here: make test-vllm"
)


class Ran(NamedTuple):
    """The result of a run: how many cases of each file passed, and the reports of all others."""

    passed: dict[str, int]
    others: dict[str, list[str]]
    said: str


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with vLLM's tests, our scenarios beside them, and the model they name."""
    folder = tmp_path_factory.mktemp("upstream")
    for name in ("tests", "pyproject.toml"):
        (folder / name).symlink_to(WORK / name)
    (folder / "scenarios").symlink_to(SCENARIOS)
    opt.write(folder)
    return folder


def run(work: Path, report: Path, *arguments: str) -> Ran:
    """Run pytest in the folder, and return its report."""
    command = [
        sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider",
        "-o", "asyncio_default_fixture_loop_scope=function", f"--timeout={CASE_S}",
        f"--junit-xml={report}", *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        command, cwd=work, env=environment, capture_output=True, text=True, timeout=RUN_S
    )
    said = (done.stdout + done.stderr)[-8000:]
    assert report.exists(), said
    passed: dict[str, int] = {}
    others: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        file = _file_of(case.get("classname") or case.get("name") or "")
        if not len(found := [part for part in case if part.tag in ("failure", "error", "skipped")]):
            passed[file] = passed.get(file, 0) + 1
        for part in found:
            text = f"{case.get('name')} {part.tag}: {part.text or part.get('message')}"
            others.setdefault(file, []).append(text)
    return Ran(passed, others, said)


def _file_of(classname: str) -> str:
    """Return the name of the module in which a case's class is."""
    return next((part for part in classname.split(".") if part.startswith("test_")), classname)


def test_vllms_own_tests_of_the_shim(work: Path, tmp_path: Path) -> None:
    """vLLM's own tests of the shim pass, with FlexKV hidden behind the mock that they bring."""
    ran = run(
        work, tmp_path / "report.xml", "-p", "scenarios.hidden",
        "tests/v1/kv_connector/unit/test_flexkv_connector.py",
    )  # fmt: skip
    assert not ran.others, ran.said
    assert ran.passed == {"test_flexkv_connector": 16}


@pytest.fixture(scope="session")
def scenarios(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Run all scenarios once, since importing vLLM takes most of the time."""
    report = tmp_path_factory.mktemp("upstream") / "report.xml"
    return run(work, report, "--numprocesses", "2", "--dist", "loadscope", "scenarios")


support = pytest.mark.support
PLAIN = support("model", "decoders with full attention (Llama, Qwen, OPT)")
SHOWN = {
    "test_loads": PLAIN,
    "test_mixtures": PLAIN,
    "test_puts": PLAIN,
    "test_scheduling": (PLAIN, support("feature", "chunked prefill, preemption")),
    "test_failures": support("feature", "aborted requests; `kv_load_failure_policy: recompute`"),
    "test_hybrid_moments": support(
        "feature", "several KV groups: preempted and aborted requests", "served",
        "with its own connector",
    ),
    "test_several": support("feature", "beside other connectors (`MultiConnector`)"),
    "test_hybrids": (
        support("model", "with sliding windows (Gemma 3 and 4, gpt-oss)", "served",
                "with its own connector"),
        support("model", "with sliding windows alone (Mistral 7B v0.1, Phi-3, StarCoder2)",
                "served", "with its own connector"),
        support("model", "with chunked attention (Llama 4)", "served", "with its own connector"),
        support("model", "hybrid: attention and state layers (Nemotron-H, Qwen3-Next)", "served",
                "with its own connector"),
        support("model", "with MLA and an indexer (DeepSeek V3.2)", "served",
                "with its own connector"),
        support("cache", "groups whose blocks differ in size or dtype", "served",
                "with its own connector"),
        support("cache", "groups of which vLLM caches no prefixes: compressors' rings, replayed"
                " windows", "served", "with its own connector, which leaves them out"),
        support("feature", "several KV groups: loads that fail in one of them"),
    ),
    "test_clears": support(
        "feature",
        "`/reset_prefix_cache?reset_external=true`; weights that are updated in place",
        "served",
        "with its own connector only: see below",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(path.stem, marks=SHOWN.get(path.stem, ()))
        for path in sorted(SCENARIOS.glob("test_*.py"))
    ],
)
def test_scenarios(scenarios: Ran, file: str) -> None:
    """Every case of the file has passed; none was skipped."""
    assert file not in scenarios.others, "\n".join(scenarios.others[file])
    assert scenarios.passed.get(file), scenarios.said
