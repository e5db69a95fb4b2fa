"""A folder that changes as a mounted Secret does: the kubelet writes the files aside and turns one link."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


class CertificateAuthority:
    def __init__(self, folder: Path):
        self._folder = folder
        folder.mkdir()
        self._run("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30",
                  "-subj", "/CN=test", "-keyout", "ca.key", "-out", "ca.crt")  # fmt: skip

    def issue(self, into: Path, name: str) -> None:
        """Writes tls.crt, tls.key and ca.crt, as cert-manager does for components/cert_manager."""
        (self._folder / "extensions").write_text(
            f"subjectAltName=DNS:{name}\nextendedKeyUsage=serverAuth,clientAuth\n", encoding="utf-8"
        )
        into.mkdir()
        self._run("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}",
                  "-keyout", str(into / "tls.key"), "-out", "request")  # fmt: skip
        self._run("x509", "-req", "-in", "request", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
                  "-days", "30", "-extfile", "extensions", "-out", str(into / "tls.crt"))  # fmt: skip
        (into / "ca.crt").write_bytes((self._folder / "ca.crt").read_bytes())

    def _run(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self._folder, check=True, capture_output=True)


class SecretFolder:
    def __init__(self, path: Path, authority: CertificateAuthority, name: str):
        self.path = path
        self._authority = authority
        self._name = name
        self._version = 0
        path.mkdir()
        self.renew()
        for file in ("tls.crt", "tls.key", "ca.crt"):
            (path / file).symlink_to(f"..data/{file}")

    def renew(self) -> None:
        self._version += 1
        version = f"..version_{self._version}"
        self._authority.issue(self.path / version, self._name)
        (self.path / "..data_tmp").symlink_to(version)
        os.replace(self.path / "..data_tmp", self.path / "..data")
