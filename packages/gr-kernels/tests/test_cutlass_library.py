"""How the library in CUDA C++ is built, kept, trusted and offered; and what nvcc makes of it.

Most of it is tested with a compiler that stands where nvcc does, understands its arguments and
makes the emulated library, see `.cutlass_emulated`. `TestNvcc` has the real one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from gr_core.errors import GrError
from gr_kernels.cuda import library, self_test
from gr_kernels.kernels_command import kernels

from .cutlass_emulated import command, needs_compiler

DEVICE = "nvidia-test"
PACKAGE = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the user's."""
    monkeypatch.setenv("GR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(library.FOLDER_VARIABLE, raising=False)
    return library.folder()


class Nvcc:
    """A compiler in a folder of its own; ``runs`` counts what it has compiled."""

    def __init__(self, home: Path) -> None:
        self.home = home
        (home / "bin").mkdir(parents=True)
        (home / "include" / "cute").mkdir(parents=True)
        (home / "include" / "cute" / "tensor.hpp").touch()
        (home / "include" / "cutlass").mkdir()
        self.set_cutlass(2)
        self.set("13.0.88")

    def set_cutlass(self, minor: int) -> None:
        lines = (("MAJOR", 4), ("MINOR", minor), ("PATCH", 0))
        text = "".join(f"#define CUTLASS_{name} {number}\n" for name, number in lines)
        (self.home / "include" / "cutlass" / "version.h").write_text(text)

    def set(self, version: str, before: str = "") -> None:
        """``before`` runs before it compiles."""
        compiler = command("$number", "$out")
        script = f"""\
            #!/bin/sh
            if [ "$1" = --version ]; then
              echo 'Cuda compilation tools, release 13.0, V{version}'
              exit
            fi
            number= out=
            while [ $# -gt 0 ]; do
              case "$1" in
                -DGR_CUDA_ARCHITECTURE=*) number="${{1#*=}}" ;;
                -o) out="$2" ;;
              esac
              shift
            done
            echo "$number" >> {self.home}/runs
            {before}
            exec {" ".join(compiler)}
            """
        file = self.home / "bin" / "nvcc"
        file.write_text(textwrap.dedent(script))
        file.chmod(0o755)

    @property
    def runs(self) -> int:
        file = self.home / "runs"
        return len(file.read_text().split()) if file.exists() else 0


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nvcc:
    if needs_compiler.args[0]:
        pytest.skip(needs_compiler.kwargs["reason"])
    made = Nvcc(tmp_path / "toolkit")
    monkeypatch.setenv("CUDA_HOME", str(made.home))
    monkeypatch.setenv(library.HEADERS_VARIABLE, str(made.home))
    return made


def quick(nvcc: Nvcc) -> None:
    """Makes a file at once, which is no library, where only files matter."""
    nvcc.set("13.0.88", 'echo "made of $number" > "$out"; exit')


def left_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if not file.name.endswith(".lock"))


class TestBuild:
    def test_what_is_built_is_loaded_and_not_built_again(self, nvcc: Nvcc, folder: Path):
        assert library.find("sm_80") is None
        said: list[str] = []
        file = library.build("sm_80", report=said.append)
        assert file == library.find("sm_80")
        assert file.parent == folder
        assert folder.stat().st_mode & 0o777 == 0o700
        assert library.load(file).architecture == "sm_80"
        assert said == [
            "sm_80: compiling with nvcc 13.0.88 and CUTLASS 4.2.0",
            f"sm_80: built {file}",
        ]
        assert library.build("sm_80") == file
        assert nvcc.runs == 1
        assert left_in(folder) == sorted([file.name, file.with_suffix(".json").name])

    def test_its_name_tells_what_it_was_built_of(self, nvcc: Nvcc, monkeypatch: pytest.MonkeyPatch):
        quick(nvcc)
        files = {library.build("sm_80"), library.build("sm_90a")}
        nvcc.set_cutlass(3)
        files.add(library.build("sm_80"))
        nvcc.set("13.1.2", 'touch "$out"; exit')
        files.add(library.build("sm_80"))
        before = library.sources_key()
        monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-g"))
        library.sources_key.cache_clear()
        try:
            assert library.sources_key() != before
            assert library.find("sm_80") is None
            files.add(library.build("sm_80"))
        finally:
            monkeypatch.undo()
            library.sources_key.cache_clear()
        assert len(files) == nvcc.runs == 5

    def test_sources_are_part_of_its_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        before = library.sources_key()
        shutil.copytree(library.SOURCES, tmp_path / "sources")
        (tmp_path / "sources" / "attention.cuh").open("a").write("// more\n")
        monkeypatch.setattr(library, "SOURCES", tmp_path / "sources")
        library.sources_key.cache_clear()
        assert library.sources_key() != before
        library.sources_key.cache_clear()

    def test_two_processes_build_it_once(self, nvcc: Nvcc):
        nvcc.set("13.0.88", 'sleep 0.5; echo made > "$out"; exit')
        line = "from gr_kernels.cuda import library; print(library.build('sm_80'))"
        processes = [
            subprocess.Popen([sys.executable, "-c", line], stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        said = {process.communicate(timeout=60)[0] for process in processes}
        assert len(said) == nvcc.runs == 1

    def test_what_is_interrupted_leaves_nothing_that_is_used(self, nvcc: Nvcc, folder: Path):
        nvcc.set("13.0.88", 'echo half > "$out"; sleep 60')
        line = "from gr_kernels.cuda import library; library.build('sm_80')"
        process = subprocess.Popen([sys.executable, "-c", line], start_new_session=True)
        wait_until(lambda: any(folder.glob(".build-*/*.so")) if folder.exists() else False)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert library.find("sm_80") is None
        quick(nvcc)
        file = library.build("sm_80")
        assert file.read_text() == "made of 80\n"
        assert left_in(folder) == sorted([file.name, file.with_suffix(".json").name])

    def test_a_compiler_that_hangs_is_ended(
        self, nvcc: Nvcc, folder: Path, monkeypatch: pytest.MonkeyPatch
    ):
        nvcc.set("13.0.88", f"echo $$ > {nvcc.home}/pid; sleep 60")
        monkeypatch.setattr(library, "LONGEST", 0.5)
        with pytest.raises(GrError, match=r"nvcc did not end within 0\.5 s"):
            library.build("sm_80")
        pid = int((nvcc.home / "pid").read_text())
        wait_until(lambda: not is_running(pid))
        assert left_in(folder) == []

    def test_its_last_lines_tell_what_is_wrong(self, nvcc: Nvcc, folder: Path):
        nvcc.set("13.0.88", "seq 1 99; echo 'gr_cuda.cu(7): error: no' >&2; exit 2")
        with pytest.raises(
            GrError, match=r"nvcc failed for sm_80; .*\n81\n(?s:.*)\(7\): error: no"
        ):
            library.build("sm_80")
        assert left_in(folder) == []

    def test_unknown_architectures(self):
        with pytest.raises(GrError, match="'sm_70'; expected one of sm_80, sm_90a"):
            library.build("sm_70")

    def test_another_folder(self, nvcc: Nvcc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        quick(nvcc)
        file = library.build("sm_80", tmp_path / "out")
        assert file.parent == tmp_path / "out"
        assert library.find("sm_80") is None
        monkeypatch.setenv(library.FOLDER_VARIABLE, str(tmp_path / "out"))
        assert library.find("sm_80") == file


class TestToolchain:
    def test_no_nvcc(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        for variable in ("CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(library, "USUAL", tmp_path)
        monkeypatch.setattr(library, "find_spec", lambda name: None)
        with pytest.raises(GrError, match=r"nvcc is not found in .*; install the CUDA toolkit"):
            library.build("sm_80")

    def test_a_home_without_nvcc(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        with pytest.raises(GrError, match=r"CUDA_HOME is .*, which has no bin/nvcc"):
            library.find_nvcc()

    def test_an_nvcc_that_does_not_run(self, nvcc: Nvcc):
        (nvcc.home / "bin" / "nvcc").write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
        with pytest.raises(GrError, match="--version says: 'out of order'"):
            library.find_toolchain()

    def test_nvcc_of_a_wheel(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        for variable in ("CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(variable, raising=False)
        file = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
        file.parent.mkdir(parents=True)
        file.write_text("#!/bin/sh\n")
        file.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(library, "USUAL", tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        assert library.find_nvcc() == file

    def test_no_headers(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        monkeypatch.setenv(library.HEADERS_VARIABLE, str(tmp_path))
        with pytest.raises(GrError, match=r"GR_CUTLASS_DIR is .*, which has no include/cute"):
            library.find_headers()
        monkeypatch.delenv(library.HEADERS_VARIABLE)
        monkeypatch.setattr(library, "find_spec", lambda name: None)
        with pytest.raises(GrError, match="CUTLASS are not installed; pip install nvidia-cutlass"):
            library.find_headers()


class TestTrust:
    def test_a_damaged_library_is_not_loaded_but_built_again(self, nvcc: Nvcc):
        file = library.build("sm_80")
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(GrError, match="is not what was built; run `gr kernels build`"):
            library.load(file)
        assert library.build("sm_80") == file
        assert library.load(file).architecture == "sm_80"
        assert nvcc.runs == 2
        file.with_suffix(".json").write_text("{")
        assert "its digest, is missing or damaged" in library.damage(file)

    def test_something_else_is_not_loaded(self, nvcc: Nvcc):
        quick(nvcc)
        with pytest.raises(GrError, match="run `gr kernels build`"):
            library.load(library.build("sm_80"))
        other = nvcc.home / "other.so"
        (nvcc.home / "other.c").write_text("int gr_cuda_abi_version(void) { return 1; }\n")
        subprocess.run(["cc", "-shared", "-o", other, nvcc.home / "other.c"], check=True)
        with pytest.raises(OSError, match="is no library of gr-kernels"):
            library.Library(other)

    def test_another_interface_is_not_called(self, nvcc: Nvcc, monkeypatch: pytest.MonkeyPatch):
        file = library.build("sm_80")
        monkeypatch.setattr(library, "ABI_VERSION", 2)
        with pytest.raises(OSError, match="has the interface 1, expected 2"):
            library.Library(file)

    def test_what_others_can_write_is_refused(self, nvcc: Nvcc, folder: Path):
        quick(nvcc)
        file = library.build("sm_80")
        file.chmod(0o666)
        assert "can be written by others; run chmod go-w on it" in library.damage(file)
        file.chmod(0o600)
        folder.chmod(0o770)
        assert "can be written by others" in library.damage(file)
        with pytest.raises(GrError, match="can be written by others"):
            library.build("sm_90a")
        folder.chmod(0o700)
        assert library.damage(file) == ""

    @pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root gives files away")
    def test_what_belongs_to_others_is_refused(self, nvcc: Nvcc):
        quick(nvcc)
        file = library.build("sm_80")
        os.chown(file, 12345, -1)
        assert "belongs to the user 12345; expected 0" in library.damage(file)


class TestOffer:
    def test_it_is_offered_where_it_passed_its_test(self, nvcc: Nvcc):
        hopper, ampere = (9, 0), (8, 0)
        found, reason = library.usable(hopper, DEVICE)
        assert found is None
        assert reason == (
            "not built for sm_90a; run `gr kernels build`; not built for sm_80; run "
            "`gr kernels build`"
        )
        quick(nvcc)
        file = library.build("sm_90a")
        assert "was never tested on nvidia-test" in library.usable(hopper, DEVICE)[1]
        library.record(file, DEVICE, "the error is 3")
        assert (
            "failed its self-test on nvidia-test: the error is 3"
            in (library.usable(hopper, DEVICE)[1])
        )
        # The next best architecture stands in for one that fails.
        older = library.build("sm_80")
        library.record(older, DEVICE, "")
        assert library.usable(hopper, DEVICE)[0] == older
        library.record(file, DEVICE, "")
        assert library.usable(hopper, DEVICE) == (
            file,
            f"{file.name} passed its self-test on {DEVICE}",
        )
        assert library.usable(ampere, DEVICE)[0] == older
        assert library.usable(hopper, "nvidia-other")[0] is None
        file.write_text("another")
        assert library.usable(hopper, DEVICE)[0] == older

    def test_outcomes_of_a_folder_that_cannot_be_written_are_the_users(
        self, nvcc: Nvcc, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
    ):
        quick(nvcc)
        file = library.build("sm_90a", tmp_path / "out")
        monkeypatch.setenv(library.FOLDER_VARIABLE, str(tmp_path / "out"))
        # Root may write anywhere; so the question itself is answered here.
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        library.record(file, DEVICE, "")
        assert left_in(folder) == [f"{file.stem}.{DEVICE}.json"]
        assert library.usable((9, 0), DEVICE)[0] == file

    def test_what_devices_run(self):
        assert library.architectures((7, 5)) == ()
        assert library.architectures((8, 6)) == ("sm_80",)
        assert library.architectures((10, 0)) == ("sm_80",)
        found, reason = library.usable((7, 5), DEVICE)
        assert found is None
        assert "(7, 5); expected 8.0 or more" in reason

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_without_a_device_it_is_not_offered_and_nothing_is_built(self, folder: Path):
        ok, reason = library.probe()
        assert not ok
        assert reason
        assert not folder.exists()

    def test_a_self_test_is_a_process_of_its_own(self, nvcc: Nvcc):
        file = library.build("sm_80")
        assert self_test.failure_of(file, "cpu", longest=0.01) == "it did not end within 0.01 s"
        file.write_bytes(b"")
        assert "is not what was built" in self_test.failure_of(file, "cpu")


class TestCommand:
    def test_build(self, nvcc: Nvcc, tmp_path: Path):
        quick(nvcc)
        out = tmp_path / "out"
        arguments = ["build", "--arch", "sm_80", "--arch", "sm_90a", "--out", str(out)]
        done = CliRunner().invoke(kernels, arguments)
        assert done.exit_code == 0, done.output
        # Older versions of click put what goes to stderr there, too.
        files = [Path(line) for line in done.output.splitlines() if line.startswith(str(out))]
        assert [file.parent for file in files] == [out, out]
        assert all(file.exists() for file in files)
        assert "sm_80: compiling with nvcc 13.0.88" in done.output
        assert "sm_90a: not tested, no CUDA device here runs it" in done.output

    def test_mistakes(self, nvcc: Nvcc):
        done = CliRunner().invoke(kernels, ["build", "--arch", "sm_70"])
        assert "'sm_70'; expected one of sm_80, sm_90a" in str(done.exception)
        nvcc.set("13.0.88", "exit 1")
        done = CliRunner().invoke(kernels, ["build", "--arch", "sm_80"])
        assert isinstance(done.exception, GrError)
        done = CliRunner().invoke(kernels, ["list", "--op", "nothing"])
        assert "there is no op 'nothing'; there are: " in str(done.exception)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_a_test_needs_a_device(self):
        done = CliRunner().invoke(kernels, ["test"])
        assert "there is no CUDA device that torch can use" in str(done.exception)

    def test_list(self):
        done = CliRunner().invoke(kernels, ["list", "--op", "hstu_attention", "--json"])
        assert done.exit_code == 0, done.output
        rows = json.loads(done.stdout)
        assert {row["op"] for row in rows} == {"hstu_attention"}
        reference = next(row for row in rows if row["kernel"] == "hstu_attention-reference")
        assert reference["status"] == "ok"
        whole = CliRunner().invoke(kernels, ["list"]).stdout
        assert "hstu_stack-torch" in whole


def no_nvcc() -> str:
    """Why nvcc cannot be asked; empty where it can."""
    try:
        library.find_toolchain()
    except (GrError, OSError) as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    if reason := no_nvcc():
        pytest.skip(reason)
    out = tmp_path_factory.mktemp("cuda")
    with ThreadPoolExecutor() as pool:
        files = pool.map(lambda one: library.build(one, out), library.ARCHITECTURES)
        return dict(zip(library.ARCHITECTURES, files, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(600)
class TestNvcc:
    """The real thing: both architectures, compiled once."""

    def test_they_load_without_a_device(self, built: dict[str, Path]):
        for architecture, file in built.items():
            assert library.load(file).architecture == architecture

    def test_only_the_driver_is_needed_and_only_functions_of_ours_are_seen(
        self, built: dict[str, Path]
    ):
        for file in built.values():
            command = ["readelf", "--wide", "--dynamic", "--dyn-syms", file]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for name in re.findall(r"NEEDED.*\[(.*)\]", text):
                assert name.split(".")[0] not in ("libcudart", "libcuda", "libtorch"), name
            ours = [
                line.split()[7]
                for line in text.splitlines()
                if "FUNC" in line and "DEFAULT" in line and "UND" not in line
            ]
            assert sorted(ours) == [
                "gr_cuda_abi_version",
                "gr_cuda_architecture",
                "gr_cuda_hstu_attention",
                "gr_cuda_hstu_attention_size",
            ]

    def test_no_register_is_spilled_and_no_product_waits(self, built: dict[str, Path]):
        for file in built.values():
            output = "\n".join(json.loads(file.with_suffix(".json").read_text())["output"])
            spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", output)
            assert spills == [("0", "0")] * 8  # and the sums of splits
            # C7508: setmaxnreg is ignored; C7510 to C7514: products of warp groups in series.
            assert not re.search(r"C75\d\d", output), output
            assert "error" not in output
            assert "warning" not in output

    def test_they_are_of_their_instructions(self, built: dict[str, Path]):
        """No slower path: products of tensor cores, copies past registers, no local memory."""
        tool = find_cuobjdump()
        if tool is None:
            pytest.skip("needs cuobjdump, of the CUDA toolkit or of Triton")
        expected = {
            "sm_80": ("HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "LDGSTS", "LDSM.16.M88.4"),
            "sm_90a": ("HGMMA.64x128x16.F32.BF16", "HGMMA.64x64x16.F32 ", "HGMMA.64x256x16.F32",
                       "UTMALDG.3D", "LDGSTS", "SYNCS", "USETMAXREG"),
        }  # fmt: skip
        for architecture, file in built.items():
            elves = subprocess.run(
                [tool, "-lelf", file], capture_output=True, text=True, check=True
            )
            assert f".{architecture}.cubin" in elves.stdout
            code = subprocess.run([tool, "-sass", file], capture_output=True, text=True, check=True)
            for instruction in expected[architecture]:
                assert instruction in code.stdout, instruction
            assert not re.search(r"\b(STL|LDL)\b", code.stdout)
            # Products do not fall back to the older ones.
            assert (" HMMA" in code.stdout) == (architecture == "sm_80")


def find_cuobjdump() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    triton = find_spec("triton")
    for place in (triton.submodule_search_locations or ()) if triton else ():
        file = Path(place, "backends", "nvidia", "bin", "cuobjdump")
        if file.is_file():
            return str(file)
    return None


def wait_until(condition: object, seconds: float = 20.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(
    not (PACKAGE / "hatch_build.py").exists() or find_spec("hatchling") is None,
    reason="needs the source tree and hatchling",
)
def test_a_wheel_brings_the_sources(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=PACKAGE,
        env=os.environ | {"GR_KERNELS_NATIVE": "off"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in library.SOURCES.iterdir():
        assert f"gr_kernels/cuda/cutlass/{file.name}" in names
