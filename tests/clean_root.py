"""A Debian that has nothing else, for tests of what users do on one: made by debootstrap from the mirror of this machine, as root.

Packages of Python come as they do here: the settings of pip, and the directories that those name, are there too. Nothing of them is kept.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from conftest import ROOT
from lacking import lack

SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
CACHE = ROOT / "build" / "clean-root"
AS_IN_IMAGES = """\
DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin || true"; };
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Acquire::Languages "none";
"""
"""What Debian's images say to apt, so that it leaves nothing of what it has downloaded."""


def need(*programs: str) -> None:
    """Skip a test that this machine cannot run; in `make test-all` it fails."""
    missing = [program for program in programs if shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/usr/libexec/podman") is None]
    if missing or os.geteuid() != 0:
        lack(f"CLEAN DEBIAN ABSENT: it takes root and {', '.join(missing) or 'nothing else'}, so nothing of this was checked")


def debian() -> Path:
    """Return the archive of a minimal Debian; made once, in `build/`."""
    archive = CACHE / f"{SUITE}.tar"
    if not archive.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        root = CACHE / SUITE
        shutil.rmtree(root, ignore_errors=True)
        run("debootstrap", "--variant=minbase", SUITE, root, _mirror())
        (root / "etc/apt/apt.conf.d/docker-clean").write_text(AS_IN_IMAGES)
        for left in (*root.glob("var/cache/apt/archives/*.deb"), *root.glob("var/lib/apt/lists/*_*"), root / "etc/resolv.conf"):
            left.unlink(missing_ok=True)
        run("tar", "--create", "--file", archive.with_suffix(".part"), "--directory", root, ".")
        archive.with_suffix(".part").rename(archive)
        shutil.rmtree(root)
    return archive


def run(*command: object, timeout: float = 1800) -> str:
    """Return what a command has said; the test fails with it where the command does."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{command} ends with {done.returncode}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def _mirror() -> str:
    """Return where this machine has its Debian packages from."""
    sources = [*Path("/etc/apt").glob("sources.list"), *Path("/etc/apt/sources.list.d").glob("debian.sources")]
    found = [re.findall(r"^(?:URIs: *|deb (?:\[.*\] )?)(http\S+/debian)/?\s*", file.read_text(), re.MULTILINE) for file in sources]
    return next((uri for uris in found for uri in uris), MIRROR)


def give_pip(place: Path) -> dict[Path, Path]:
    """Write this machine's settings of pip for a root. Returns what is to be seen in it, and where."""
    settings: dict[str, str] = {}
    for line in run(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        settings[name.rpartition(".")[2]] = value.strip("'\"")
    seen = {place / "pip.conf": Path("/etc/pip.conf")}
    if certificates := settings.get("cert"):
        shutil.copy(certificates, place / "pip.pem")
        settings["cert"] = "/etc/pip.pem"
        seen[place / "pip.pem"] = Path("/etc/pip.pem")
    for word in " ".join(settings.values()).split():
        url = urlsplit(word)
        if url.scheme in ("", "file") and (directory := Path(url.path)).is_dir():
            above = directory.parent if directory.name == "simple" else directory  # an index names files beside itself
            seen[above] = above
    (place / "pip.conf").write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    return seen


def copy_checkout(place: Path) -> None:
    """Copy what belongs to the project, as a checkout of it."""
    listed = run("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / name)
