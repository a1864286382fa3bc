"""Products of bf16 on CPUs without instructions for them, in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_tst.common import bf16
from megatron_tst.cpu import widened
from tests import widened_checks
from tests.zygote import Launcher

CHECKS = sorted(name for name in vars(widened_checks) if name.startswith("check_"))


@pytest.fixture(scope="module")
def platform() -> Iterator[Launcher]:
    """Starts processes where the platform is on, and oneDNN knows no bf16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
        owner = Launcher()
        yield owner
        owner.close()


@pytest.mark.parametrize("check", CHECKS)
def test_widened(platform: Launcher, tmp_path: Path, check: str) -> None:
    platform.run([check], tmp_path / "log", main="tests.widened_checks:main")


@pytest.fixture
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("unlimited")
def test_a_cpu_with_instructions_keeps_torchs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16, "hardware_flags", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.setattr(widened, "_library", lambda: pytest.fail("replaced"))
    before = torch._C._dispatch_dump("aten::mm")
    widened.install()
    assert torch._C._dispatch_dump("aten::mm") == before


@pytest.mark.usefixtures("unlimited")
def test_this_cpu() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    has_instructions = any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    assert bf16.bf16_products() == ("native" if has_instructions else "widened")


X86 = "processor\t: 0\nvmx flags\t: vnmi bf16\nflags\t\t: fpu avx2 {}\nbugs\t\t: spectre_v1\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd {}\nCPU implementer\t: 0x41\n"


def use_cpu(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    def read_text() -> str:
        if text is None:
            raise FileNotFoundError("/proc/cpuinfo")
        return text

    monkeypatch.setattr(bf16, "Path", lambda path: SimpleNamespace(read_text=read_text))
    monkeypatch.setattr(bf16, "hardware_flags", bf16.hardware_flags.__wrapped__)


@pytest.mark.usefixtures("unlimited")
@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (X86.format("avx512f avx512_bf16"), "avx512_bf16"),
        (X86.format("avx512_bf16 amx_bf16 amx_tile"), "amx_bf16, avx512_bf16"),
        (X86.format("amx_bf16"), "amx_bf16"),
        (X86.format("avx512f avx512_vnni"), None),
        # Names that begin or end alike.
        (X86.format("avx512_bf16x xamx_bf16"), None),
        (ARM.format("bf16 i8mm"), "bf16"),
        (ARM.format("sve svebf16 bf16"), "bf16, svebf16"),
        (ARM.format("asimdhp"), None),
        ("processor : 0\n", None),
        ("", None),
        (None, None),
    ],
)
def test_instructions_of_a_cpu(
    monkeypatch: pytest.MonkeyPatch, text: str | None, flags: str | None
) -> None:
    use_cpu(monkeypatch, text)
    assert bf16.bf16_products() == ("widened" if flags is None else "native")
    if flags is None:
        assert bf16.describe_bf16() == "widened to fp32 (this CPU has no bf16 instructions)"
    else:
        assert bf16.describe_bf16() == f"native ({flags})"


@pytest.mark.usefixtures("unlimited")
@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
@pytest.mark.parametrize(
    ("value", "products"),
    [
        ("AVX2", "widened"),
        ("avx2", "widened"),
        ("SSE41", "widened"),
        ("AVX512_CORE", "widened"),
        ("avx512_core_vnni", "widened"),
        ("AVX2_VNNI_2", "widened"),
        ("AVX512_CORE_BF16", "native"),
        ("avx512_core_amx", "native"),
        ("DEFAULT", "native"),
        ("ALL", "native"),
        ("", "native"),
        # oneDNN ignores what it does not know.
        ("AVX3", "native"),
    ],
)
def test_limits_of_onednn(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, products: str
) -> None:
    use_cpu(monkeypatch, X86.format("avx512_bf16"))
    monkeypatch.setenv(name, value)
    assert bf16.bf16_products() == products
    if products == "widened":
        assert bf16.describe_bf16() == "widened to fp32 (ONEDNN_MAX_CPU_ISA forbids it)"


@pytest.mark.usefixtures("unlimited")
def test_a_limit_gives_no_instructions_to_a_cpu_without(monkeypatch: pytest.MonkeyPatch) -> None:
    use_cpu(monkeypatch, X86.format(""))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX")
    assert bf16.bf16_products() == "widened"


@pytest.mark.usefixtures("unlimited")
def test_the_newer_name_of_the_limit_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    use_cpu(monkeypatch, X86.format("avx512_bf16"))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "ALL")
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    assert bf16.bf16_products() == "native"
