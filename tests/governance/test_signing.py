"""A signature covers every file of the folder; another key, another file and no library are one line each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moe_train.governance.signing import check_signature, sign
from moe_train.proof.checks import Fault


def write_key(folder: Path, name: str) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    secret = private.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    for path, content in ((folder / f"{name}.pem", secret), (folder / f"{name}.pub", public)):
        path.write_bytes(content)
    return folder / f"{name}.pem", folder / f"{name}.pub"


def test_a_signature_holds_for_these_files_and_this_key(tmp_path):
    pytest.importorskip("model_signing", reason="model-signing comes with the extras evidence and judges")
    folder = tmp_path / "out"
    (folder / "records").mkdir(parents=True)
    (folder / "records/run.json").write_text("{}")
    (folder / "evidence.json").write_text("{}")
    private, public = write_key(tmp_path, "ours")
    _, other = write_key(tmp_path, "other")
    with pytest.raises(Fault, match=r"has no evidence\.sig; sign it: moe-train evidence --seal"):
        check_signature(folder, public)
    with pytest.raises(ValueError, match="is not a private key that can sign"):
        sign(folder, public)
    sign(folder, private)
    sign(folder, private)  # again: the earlier signature is not part of what is signed
    assert "signed with the key" in check_signature(folder, public).summary
    with pytest.raises(Fault, match=r"is no signature of these files by .*other\.pub"):
        check_signature(folder, other)
    (folder / "records/run.json").write_text("{ }")
    with pytest.raises(Fault, match=r"Hash mismatch for 'records/run\.json'"):
        check_signature(folder, public)
    with pytest.raises(FileNotFoundError, match="no such key file"):
        check_signature(folder, tmp_path / "gone.pub")


def test_without_the_library_one_line_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(ValueError, match=r"signatures need the extra evidence .*: bash launch/install\.sh evidence"):
        sign(tmp_path, tmp_path / "key.pem")
