"""A payload signed with the publisher's key, in the format of OpenSSF model-signing, and such a signature checked.

The signature is a Sigstore bundle: an in-toto statement with the digest of every signed file, under DSSE. What else is
rendered or noted beside a payload is named in it as not signed, so that `model_signing verify key` needs no options.
https://github.com/sigstore/model-transparency. The library is the extra `signing`, and imported here alone.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from builder.digests import DIGESTER
from builder.errors import BuildError, VerifyError, raise_all
from builder.lock import CARD_FILES, SIGNATURE
from builder.manifest import show_path

CURVES = ("secp256r1", "secp384r1", "secp521r1")  # those that the format knows
BESIDE = (*CARD_FILES, "attestations", ".cache")  # the last is what `hf download` leaves
OF_GIT = (".git", ".gitattributes", ".github", ".gitignore")  # never signed, by the format's convention
PASSWORD = "SIGNING_KEY_PASSWORD"
MAKE_KEY = "`openssl ecparam -name prime256v1 -genkey -noout -out FILE` makes one"
TAKE_PUBLIC = "`openssl ec -in PRIVATE -pubout -out FILE` takes it out of the private key"


def require_library() -> None:
    """Refuse to go on where the extra is not installed."""
    if importlib.util.find_spec("model_signing") is None:
        fix = "pip install --constraint constraints.txt --editable '.[signing]'"
        raise BuildError("model-signing, which makes and checks signatures, is not installed", "the environment", fix)


def sign_folder(folder: Path, payload: Mapping[str, str], key: Path, password: str | None) -> tuple[str, str]:
    """Sign a payload. Returns the bundle, JSON of which no two are the same, and the sha256 of the public key's PEM.

    payload: the sha256 by file that the folder has to have; every file is read.
    key: a private key, PEM. password: its own, if it is encrypted.
    Raises BuildError for a key that cannot be used, VerifyError or Problems if the folder is not the payload.
    """
    require_library()
    from model_signing import hashing, signing

    needed = check_private_key(key, password)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "signature"
        (
            signing.Config()
            # 1.1.1 says that a password is text, and hands it on to what takes bytes alone
            .use_elliptic_key_signer(private_key=key, password=needed)
            .set_hashing_config(hashing.Config().set_ignored_paths(paths=BESIDE))
            .sign(folder, path)
        )
        content = path.read_bytes()
    where = show_path(folder.absolute())
    bundle = read_bundle(content, where)
    raise_all(compare_files(bundle.files, payload, where, "locked"))
    return content.decode(), bundle.key


def check_folder(folder: Path, payload: Mapping[str, str], key: Path) -> str:
    """Check that a folder is a payload, and signed by a key; every file is read. Returns the sha256 of the key.

    payload: the sha256 by file. key: a public key, PEM.
    Raises BuildError for a key that cannot be used, VerifyError or Problems saying what is wrong with the signature.
    """
    require_library()
    from model_signing import hashing, verifying

    check_public_key(key)
    path = folder / SIGNATURE
    where = show_path(path.absolute())
    if not path.is_file():
        raise VerifyError("there is no signature", where, "doit sign:NAME makes one, or fetch the file of that name")
    bundle = read_bundle(path.read_bytes(), where)
    names = bundle.files.keys() | payload.keys()
    if differing := sorted(name for name in names if bundle.files.get(name) != payload.get(name)):
        what = f"the signature is of another payload ({differing[0]}, {len(differing)} files differ from the lock)"
        raise VerifyError(what, where, "see that lock and signature are of the same release, or sign this one")
    try:
        (
            verifying.Config()
            .use_elliptic_key_verifier(public_key=key)
            .set_hashing_config(hashing.Config().set_ignored_paths(paths=BESIDE).set_allow_symlinks(True))
            .verify(folder, path)
        )
    except OSError:
        raise
    except Exception as error:  # the library has no error of its own: whatever it raises, this is not verified
        raise_all(compare_files(hash_folder(folder), bundle.files, show_path(folder.absolute()), "signed"))
        fix = f"see that the key is the publisher's, sha256 {bundle.key}; if it is, the signature was altered"
        raise VerifyError(f"the signature is not by the key {key}", where, fix) from error
    return bundle.key


# --- the bundle -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bundle:
    """What a signature says, whoever made it. files: their sha256. key: the sha256 of the public key's PEM."""

    files: Mapping[str, str]
    key: str


def read_bundle(content: bytes, where: str) -> Bundle:
    """Raises VerifyError if it is not a signature of files by a key."""
    try:
        bundle = json.loads(content)
        predicate = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))["predicate"]
        key = bundle["verificationMaterial"]["publicKey"]["hint"]
        files = {resource["name"]: resource["digest"] for resource in predicate["resources"]}
        if predicate["serialization"]["method"] != "files" or predicate["serialization"]["hash_type"] != "sha256":
            raise ValueError("not the digests of files")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        what = "the signature is not one of files by a key, as model-signing makes it"
        raise VerifyError(what, where, "fetch it again, or sign again") from error
    return Bundle(files, str(key))


# --- files ------------------------------------------------------------------------------------------------------------


def hash_folder(folder: Path) -> dict[str, str]:
    """The sha256 of every file that a signature has to cover."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    covered = {name: path for name, path in paths.items() if not is_beside(name)}
    DIGESTER.begin(covered.values())
    return {name: DIGESTER.sha256(path) for name, path in covered.items()}


def is_beside(name: str) -> bool:
    return any(PurePosixPath(name).is_relative_to(other) for other in (*BESIDE, *OF_GIT))


def compare_files(found: Mapping[str, str], wanted: Mapping[str, str], where: str, what: str) -> list[VerifyError]:
    """What is wrong with files that have to be others', a finding each. what: how the wanted ones are called."""
    fix = "restore the files, download them again, or build and sign them again"
    problems = []
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found:
            problems.append(VerifyError(f"{name} is {what}, and missing", where, fix))
        elif name not in wanted:
            problems.append(VerifyError(f"{name} is not {what}", where, "take it away"))
        elif found[name] != wanted[name]:
            ours, theirs = found[name][:12], wanted[name][:12]
            problems.append(VerifyError(f"{name} is not the {what} one (sha256 {ours}, {what} {theirs})", where, fix))
    return problems


# --- keys -------------------------------------------------------------------------------------------------------------


def check_private_key(path: Path, password: str | None) -> bytes | None:
    """Refuse a key that cannot sign. Returns the password it needs, None if it is not encrypted."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    pem = read_pem(path, "private")
    encrypted = b"ENCRYPTED" in pem
    if encrypted and not password:
        raise BuildError(f"{path} is encrypted", "the private key", f"put its password into {PASSWORD}")
    needed = password.encode() if encrypted and password else None
    try:
        key = load_pem_private_key(pem, needed)
    except ValueError as error:
        why = f" with the password in {PASSWORD}" if encrypted else ""
        fix = f"correct {PASSWORD}, or name another key" if encrypted else MAKE_KEY
        raise BuildError(f"{path} cannot be read as a private key{why}", "the private key", fix) from error
    check_curve(key, path, "private")
    return needed


def check_public_key(path: Path) -> None:
    """Refuse a key that no signature can be by."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(read_pem(path, "public"))
    except ValueError as error:
        raise BuildError(f"{path} cannot be read as a public key", "the public key", TAKE_PUBLIC) from error
    check_curve(key, path, "public")


def read_pem(path: Path, kind: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        fix = MAKE_KEY if kind == "private" else TAKE_PUBLIC
        raise BuildError(f"{path} cannot be read: {error.strerror}", f"the {kind} key", fix) from error


def check_curve(key: Any, path: Path, kind: str) -> None:
    curve = getattr(key, "curve", None)
    if curve is None or curve.name not in CURVES:
        found = f"one of curve {curve.name}" if curve else "none of an elliptic curve"
        what = f"{path} is {found}, and the format knows {', '.join(CURVES)}"
        raise BuildError(what, f"the {kind} key", MAKE_KEY)
