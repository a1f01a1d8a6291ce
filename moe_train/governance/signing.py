"""Signatures over a folder of evidence with a local key, in the format of OpenSSF Model Signing; no network is used."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from moe_train.governance.sealed_folder import SIGNATURE_FILE
from moe_train.proof.checks import Fault, Finding


def sign(folder: Path, private_key: Path) -> Path:
    """Sign all files of a folder.

    Args:
        folder: The folder; its signature is replaced if it has one.
        private_key: PEM file of an elliptic-curve key (P-256, P-384 or P-521) without a password.

    Returns:
        The signature's file.

    Raises:
        FileNotFoundError: There is no such key.
        ValueError: The file is not such a key, or the library is not installed.
    """
    library = signing_library()
    _require_file(private_key)
    signature = folder / SIGNATURE_FILE
    signature.unlink(missing_ok=True)
    hashing = library.hashing.Config().set_ignored_paths(paths=[signature], ignore_git_paths=False)
    try:
        signer = library.signing.Config().use_elliptic_key_signer(private_key=private_key)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{private_key} is not a private key that can sign ({_brief(error)}); make one: "
            "openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
        ) from error
    signer.set_hashing_config(hashing).sign(folder, signature)
    return signature


def check_signature(folder: Path, public_key: Path) -> Finding:
    """Verify the signature of a folder.

    Raises:
        Fault: The signature is missing, is not of this key, or does not cover the files as they are.
        FileNotFoundError: There is no such key.
        ValueError: The library is not installed.
    """
    library = signing_library()
    _require_file(public_key)
    signature = folder / SIGNATURE_FILE
    if not signature.is_file():
        raise Fault(f"{folder} has no {SIGNATURE_FILE}; sign it: moe-train evidence --seal {folder} --key KEY.pem")
    try:
        verifier = library.verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        verifier.verify(folder, signature)
    # The library has no type of its own for a signature that does not fit: cryptography, protobuf and it raise many.
    except Exception as error:
        raise Fault(f"{signature} is no signature of these files by {public_key}: {_brief(error)}") from error
    return Finding(f"signed with the key that belongs to {public_key}")


def signing_library() -> ModuleType:
    """Return the library model-signing. Raises ValueError, which names the extra, if it is not installed."""
    try:
        import model_signing
    except ImportError as error:
        raise ValueError(f"signatures need the extra evidence ({_brief(error)}): bash launch/install.sh evidence") from error
    return model_signing


def _require_file(key: Path) -> None:
    if not key.is_file():
        raise FileNotFoundError(f"{key}: no such key file")


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
