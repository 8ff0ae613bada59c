"""A release is signed by the publisher's key, its signature stays with its payload, and whatever is wrong is told."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import build, release_writer
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from doit.doit_cmd import DoitMain

from builder.errors import BuildError
from builder.files import sha256_file
from builder.published import find_place
from builder.signing import MAKE_KEY, TAKE_PUBLIC
from builder.stages import STAGES, run_stage
from builder.stages.sign import check_signature, clean_signature, sign

pytestmark = pytest.mark.xdist_group("modelopt")

STEPS = tuple(stage.name for stage in STAGES if stage.name != "card")
LOOKS = ("verify", "perplexity")  # stages that take a while and change nothing
QUICK: dict[str, Any] = {"scheme.input_scale": "unit", "calibration": None, "perplexity": None}
MANIFEST, LOCK, BUILD = Path("releases/tiny.yaml"), Path("releases/tiny.lock.json"), Path("build")
ARTIFACT = BUILD / "tiny" / "artifact"
SIGNATURE = ARTIFACT / "attestations" / "model.sig"
KEY, PUBLIC = Path("publisher.pem"), Path("publisher.pub")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished release, `releases` and `build`, and a key; not to be changed."""
    folder = tmp_path_factory.mktemp("original")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("EXECUTOR", raising=False)
        patch.setattr("builder.stages.verify.SAMPLE", 0)
        release_writer(folder / "releases")(**QUICK)
        build(MANIFEST, BUILD / "tiny", "card")
    write_keys(ec.generate_private_key(ec.SECP256R1()), folder / KEY, folder / PUBLIC)
    return folder


@pytest.fixture
def copy(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same in the working directory. Its files are links, so that it is finished here too: see `replace`."""
    ignored = shutil.ignore_patterns(".held")
    shutil.copytree(original, tmp_path, ignore=ignored, copy_function=os.link, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in ("EXECUTOR", "SIGNING_KEY", "SIGNING_KEY_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def replace(path: Path, content: bytes | str) -> None:
    """Change one copy of a file, and leave the others that it is linked to."""
    path.unlink()
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def write_keys(key: Any, private: Path, public: Path, password: str | None = None) -> None:
    shut = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private.unlink(missing_ok=True)
    public.unlink(missing_ok=True)
    private.write_bytes(key.private_bytes(pem, pkcs8, shut))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))


def list_payload() -> dict[str, str]:
    payload = json.loads(LOCK.read_text("utf-8"))["payload"]
    assert len(payload) > 8
    return {name: file["sha256"] for name, file in payload.items()}


def read_statement() -> dict[str, Any]:
    envelope = json.loads(SIGNATURE.read_text("utf-8"))["dsseEnvelope"]
    statement: dict[str, Any] = json.loads(base64.b64decode(envelope["payload"]))
    return statement


def fail_to_sign(key: Path = KEY, password: str | None = None) -> str:
    with pytest.raises(BuildError) as caught:
        sign(MANIFEST, BUILD, key, password)
    assert not (BUILD / "tiny" / "receipts" / "sign.json").exists()
    return str(caught.value)


def fail_to_check(key: Path = PUBLIC, place: str = "") -> str:
    with pytest.raises(BuildError) as caught:
        check_signature(LOCK, BUILD, key, find_place(place, "--with") if place else None)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------- it works


def test_a_signature_is_over_the_payload_and_nothing_else(copy: Path) -> None:
    before = {path: path.read_bytes() for path in [LOCK, *(ARTIFACT / name for name in list_payload())]}
    signed = sign(MANIFEST, BUILD, KEY, None)
    resources = read_statement()["predicate"]["resources"]
    assert {one["name"]: one["digest"] for one in resources} == list_payload()
    assert {path.name for path in ARTIFACT.rglob("*")} > {"README.md", "model.sig", "lock.json"}
    assert {path: path.read_bytes() for path in before} == before, "lock and payload know nothing of it"
    assert check_signature(LOCK, BUILD, PUBLIC, None) == (ARTIFACT, sha256_file(PUBLIC))
    assert signed["key_sha256"] == sha256_file(PUBLIC)


def test_the_command_on_the_card_checks_what_was_downloaded(copy: Path) -> None:
    card = ARTIFACT / "README.md"
    assert "## Signature\n\nNot signed.\n" in card.read_text("utf-8")
    sign(MANIFEST, BUILD, KEY, None)
    text = card.read_text("utf-8")
    assert f"The sha256 of the public key file is `{sha256_file(PUBLIC)}`" in text
    (line,) = re.findall(r"^model_signing (verify .+)$", text, flags=re.M)
    folder = line.split()[2]
    shutil.copytree(ARTIFACT, folder)
    for left in (".cache/huggingface/x.metadata", ".gitattributes"):
        (Path(folder) / left).parent.mkdir(parents=True, exist_ok=True)
        (Path(folder) / left).write_text("what a download leaves or brings along")
    command = [sys.executable, "-m", "model_signing", *shlex.split(line)]

    def run() -> tuple[int, str]:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    assert run() == (0, "Verification succeeded\n")
    replace(Path(folder) / "NOTICE", "other")
    code, told = run()
    assert code == 1
    assert "Hash mismatch" in told and "NOTICE" in told


def test_what_was_downloaded_is_checked_as_well(copy: Path) -> None:
    sign(MANIFEST, BUILD, KEY, None)
    (copy / "cache").mkdir()
    shutil.copytree(ARTIFACT, copy / "elsewhere")
    (copy / "elsewhere" / ".gitattributes").write_text("of the Hub")
    notice = copy / "elsewhere" / "NOTICE"
    notice.rename(copy / "cache" / "blob")
    notice.symlink_to(copy / "cache" / "blob")  # as the Hub's cache has files
    folder, _ = check_signature(LOCK, BUILD, PUBLIC, find_place("elsewhere", "--with"))
    assert folder == Path("elsewhere")
    notice.write_text("other")
    assert fail_to_check(place="elsewhere").startswith("NOTICE is not the signed one (sha256 ")


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: str(curve.name))
def test_a_key_may_be_encrypted(copy: Path, curve: ec.EllipticCurve) -> None:
    write_keys(ec.generate_private_key(curve), KEY, PUBLIC, "s3cret")
    assert fail_to_sign() == (
        "publisher.pem is encrypted\n  in the private key\n  fix: put its password into SIGNING_KEY_PASSWORD"
    )
    assert fail_to_sign(password="wrong") == (
        "publisher.pem cannot be read as a private key with the password in SIGNING_KEY_PASSWORD\n"
        "  in the private key\n  fix: correct SIGNING_KEY_PASSWORD, or name another key"
    )
    sign(MANIFEST, BUILD, KEY, "s3cret")
    check_signature(LOCK, BUILD, PUBLIC, None)


def test_a_password_that_is_not_needed_is_not_used(copy: Path) -> None:
    sign(MANIFEST, BUILD, KEY, "s3cret")
    check_signature(LOCK, BUILD, PUBLIC, None)


# ----------------------------------------------------------------------------------------- it stays with its payload


def test_a_release_built_again_to_the_same_bytes_is_still_signed(copy: Path) -> None:
    sign(MANIFEST, BUILD, KEY, None)
    signature = SIGNATURE.read_bytes()
    card = (ARTIFACT / "README.md").read_text("utf-8")
    kept = BUILD / "tiny" / "receipts" / "sign.json"
    kept.rename("sign.json")
    shutil.rmtree(BUILD)
    kept.parent.mkdir(parents=True)
    Path("sign.json").rename(kept)
    build(MANIFEST, BUILD / "tiny", "card", without=LOOKS)
    assert SIGNATURE.read_bytes() == signature
    check_signature(LOCK, BUILD, PUBLIC, None)
    assert "## Signature\n\nThe files listed above are signed" in card


def test_a_changed_payload_loses_the_signature_and_says_so(copy: Path) -> None:
    sign(MANIFEST, BUILD, KEY, None)
    write = release_writer(copy / "releases")
    MANIFEST.unlink()
    write(**QUICK, **{"files.max_bytes": "1MiB"})
    workspace = build(MANIFEST, BUILD / "tiny", "lock", without=LOOKS)
    assert run_stage(workspace, STAGES[-1]) == (
        "warning: the signature there is was of another payload; `doit sign:tiny` makes a new one",
    )
    assert not SIGNATURE.exists()
    assert "Not signed." in (ARTIFACT / "README.md").read_text("utf-8")
    assert fail_to_check().startswith("there is no signature\n  in build/tiny/artifact/attestations/model.sig\n")
    write(**QUICK)
    workspace = build(MANIFEST, BUILD / "tiny", "card", without=LOOKS)
    check_signature(LOCK, BUILD, PUBLIC, None)
    assert run_stage(workspace, STAGES[-1]) == (), "it is of this payload again"


def test_a_signature_is_taken_away_on_request(copy: Path) -> None:
    sign(MANIFEST, BUILD, KEY, None)
    left = [BUILD / "tiny" / "receipts" / "sign.json", SIGNATURE]
    assert clean_signature(BUILD, "tiny", dry_run=True)[0] == left
    assert all(path.exists() for path in left)
    assert clean_signature(BUILD, "tiny", dry_run=False)[0] == left
    assert not any(path.exists() for path in left)
    assert clean_signature(BUILD, "tiny", dry_run=False) == ([], 0)
    build(MANIFEST, BUILD / "tiny", "card", without=STEPS)
    assert "Not signed." in (ARTIFACT / "README.md").read_text("utf-8")


# ------------------------------------------------------------------------------------------------ what is not signed


def test_only_what_was_verified_is_signed(copy: Path) -> None:
    (BUILD / "tiny" / "receipts" / "verify.json").unlink()
    assert fail_to_sign() == (
        "tiny is not finished: verify has not been done, or what it reads has changed since\n"
        "  in build/tiny\n"
        "  fix: doit release:tiny"
    )


def test_what_was_touched_since_is_not_signed(copy: Path) -> None:
    replace(ARTIFACT / "NOTICE", "other")
    assert fail_to_sign().startswith("tiny is not finished: assemble has not been done, or what it reads has changed")


def test_what_its_lock_does_not_say_is_not_signed(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is for a moment when the lock is restored while it is signed."""
    receipt = json.loads((BUILD / "tiny" / "receipts" / "lock.json").read_text("utf-8"))
    other = json.loads(LOCK.read_text("utf-8"))
    other["payload"]["NOTICE"]["sha256"] = "0" * 64
    other["payload_sha256"] = "1" * 64
    assert receipt["facts"]["sha256"] == sha256_file(LOCK)
    monkeypatch.setattr("builder.stages.sign.require_lock", lambda path: other)
    assert fail_to_sign() == (
        "the build of tiny is not the locked one, so it is not signed\n"
        "  in build/tiny\n"
        "  fix: build it again (doit release:tiny), or release this build as a new one: doit relock:tiny"
    )


def test_a_folder_with_a_stranger_in_it_is_not_signed(copy: Path) -> None:
    (ARTIFACT / "notes.txt").write_text("mine")
    assert fail_to_sign() == "notes.txt is not locked\n  in build/tiny/artifact\n  fix: take it away"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "key.pem cannot be read: No such file or directory"),
        (b"no key", "key.pem cannot be read as a private key"),
        ("rsa", "key.pem is none of an elliptic curve, and the format knows secp256r1, secp384r1, secp521r1"),
        ("secp256k1", "key.pem is one of curve secp256k1, and the format knows secp256r1, secp384r1, secp521r1"),
    ],
)
def test_a_key_that_cannot_sign_is_told(copy: Path, content: bytes | str | None, what: str) -> None:
    if content == "rsa":
        write_keys(rsa.generate_private_key(65537, 2048), Path("key.pem"), Path("key.pub"))
    elif isinstance(content, str):
        write_keys(ec.generate_private_key(ec.SECP256K1()), Path("key.pem"), Path("key.pub"))
    elif content:
        Path("key.pem").write_bytes(content)
    assert fail_to_sign(Path("key.pem")) == f"{what}\n  in the private key\n  fix: {MAKE_KEY}"


# -------------------------------------------------------------------------------------------- what is wrong with one


@pytest.fixture
def signed(copy: Path) -> Path:
    sign(MANIFEST, BUILD, KEY, None)
    return copy


def test_a_file_that_is_not_the_signed_one_is_named(signed: Path) -> None:
    name = next(name for name in list_payload() if name.endswith(".safetensors"))
    content = bytearray((ARTIFACT / name).read_bytes())
    content[-1] ^= 1
    replace(ARTIFACT / name, bytes(content))
    found, wanted = sha256_file(ARTIFACT / name)[:12], list_payload()[name][:12]
    assert fail_to_check() == (
        f"{name} is not the signed one (sha256 {found}, signed {wanted})\n"
        "  in build/tiny/artifact\n"
        "  fix: restore the files, download them again, or build and sign them again"
    )


def test_files_that_are_missing_or_too_many_are_named_together(signed: Path) -> None:
    (ARTIFACT / "NOTICE").unlink()
    (ARTIFACT / "pytorch_model.bin").write_bytes(b"\x80")
    assert fail_to_check() == (
        "NOTICE is signed, and missing\n  in build/tiny/artifact\n"
        "  fix: restore the files, download them again, or build and sign them again\n"
        "pytorch_model.bin is not signed\n  in build/tiny/artifact\n  fix: take it away"
    )


def test_another_key_is_told(signed: Path) -> None:
    theirs = sha256_file(PUBLIC)
    write_keys(ec.generate_private_key(ec.SECP256R1()), Path("other.pem"), Path("other.pub"))
    told = fail_to_check(Path("other.pub"))
    assert told == (
        "the signature is not by the key other.pub\n"
        "  in build/tiny/artifact/attestations/model.sig\n"
        f"  fix: see that the key is the publisher's, sha256 {theirs}; if it is, the signature was altered"
    )


def test_a_signature_that_names_the_key_but_is_not_by_it_is_told(signed: Path) -> None:
    """A forger may write any key's digest beside a signature of his own."""
    bundle = json.loads(SIGNATURE.read_text("utf-8"))
    forger = ec.generate_private_key(ec.SECP256R1())
    write_keys(forger, KEY, Path("forger.pub"))
    sign(MANIFEST, BUILD, KEY, None)
    forged = json.loads(SIGNATURE.read_text("utf-8"))
    forged["verificationMaterial"] = bundle["verificationMaterial"]
    replace(SIGNATURE, json.dumps(forged))
    assert fail_to_check().startswith("the signature is not by the key publisher.pub\n")


@pytest.mark.parametrize("signatures", [[], [{"sig": "AAAA", "keyid": ""}], [{"sig": None}]])
def test_a_bundle_without_a_signature_worth_the_name_is_told(signed: Path, signatures: list[Any]) -> None:
    bundle = json.loads(SIGNATURE.read_text("utf-8"))
    bundle["dsseEnvelope"]["signatures"] = signatures
    replace(SIGNATURE, json.dumps(bundle))
    assert fail_to_check().startswith("the signature is not by the key publisher.pub\n")


def test_a_missing_signature_is_told(copy: Path) -> None:
    assert fail_to_check() == (
        "there is no signature\n"
        "  in build/tiny/artifact/attestations/model.sig\n"
        "  fix: doit sign:NAME makes one, or fetch the file of that name"
    )


@pytest.mark.parametrize("content", [b"", b"{}", b'{"dsseEnvelope": {"payload": "e30="}}', b"[]", b"\xff\xfe"])
def test_what_is_no_signature_is_told(signed: Path, content: bytes) -> None:
    replace(SIGNATURE, content)
    assert fail_to_check() == (
        "the signature is not one of files by a key, as model-signing makes it\n"
        "  in build/tiny/artifact/attestations/model.sig\n"
        "  fix: fetch it again, or sign again"
    )


def test_a_signature_of_another_payload_is_told(signed: Path) -> None:
    """Genuine, by the publisher's key, and beside the very files it is of: but the lock is another release's."""
    before = list_payload()
    MANIFEST.unlink()
    release_writer(signed / "releases")(**QUICK, **{"files.max_bytes": "1MiB"})
    build(MANIFEST, signed / "other", "lock", without=LOOKS)
    after = list_payload()
    differing = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert len(differing) > 2
    assert fail_to_check() == (
        f"the signature is of another payload ({differing[0]}, {len(differing)} files differ from the lock)\n"
        "  in build/tiny/artifact/attestations/model.sig\n"
        "  fix: see that lock and signature are of the same release, or sign this one"
    )


@pytest.mark.parametrize(
    ("content", "what"),
    [(None, "key.pub cannot be read: No such file or directory"), (b"-", "key.pub cannot be read as a public key")],
)
def test_a_public_key_that_is_none_is_told(signed: Path, content: bytes | None, what: str) -> None:
    if content:
        Path("key.pub").write_bytes(content)
    assert fail_to_check(Path("key.pub")) == f"{what}\n  in the public key\n  fix: {TAKE_PUBLIC}"


def test_a_private_key_is_not_taken_for_a_public_one(signed: Path) -> None:
    assert fail_to_check(KEY).startswith("publisher.pem cannot be read as a public key\n")


# ----------------------------------------------------------------------------------------------- on the command line


def test_a_release_is_signed_and_checked_from_the_command_line(
    copy: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(Path(__file__).parents[1] / "pyproject.toml", copy)

    def doit(*args: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = DoitMain().run(list(args)) or 0
        return code, *capfd.readouterr()

    write_keys(ec.generate_private_key(ec.SECP256R1()), KEY, PUBLIC, "s3cret")
    sha256 = sha256_file(PUBLIC)
    monkeypatch.setenv("SIGNING_KEY_PASSWORD", "s3cret")
    assert doit("sign:tiny") == (
        1,
        "",
        "there is no key\n  in the command line\n  fix: name it: --key=PRIVATE, or SIGNING_KEY in the environment\n",
    )
    code, out, err = doit("sign:tiny", f"--key={KEY}")
    assert (code, err) == (0, "")
    assert out.endswith(f"  the public key has sha256 {sha256}\n")
    assert doit("check-signature:tiny", f"--public-key={PUBLIC}") == (
        0,
        f"  build/tiny/artifact: every file of the payload is signed, by the key of sha256 {sha256}\n",
        "",
    )
    assert doit("clean", "sign:tiny")[0] == 0
    assert doit("check-signature:tiny", "--public-key", str(PUBLIC), "--with", str(ARTIFACT))[0] == 1
    monkeypatch.setenv("SIGNING_KEY", str(KEY))
    assert doit("sign:tiny")[0] == 0
    assert doit("check-signature:tiny", "--public-key", str(PUBLIC), "--with", str(ARTIFACT))[0] == 0
    place = f"me/tiny@{'a' * 40}"
    assert doit("check-signature:tiny", f"--public-key={PUBLIC}", f"--with={place}") == (
        1,
        "",
        "a signature is checked in a folder, for every file is read\n"
        "  in the command line: --with\n"
        f"  fix: hf download me/tiny --revision {'a' * 40} --local-dir FOLDER, then --with=FOLDER\n",
    )
    assert doit("check-signature:tiny")[2].startswith("there is no key\n  in the command line\n")


def test_a_builder_without_the_extra_says_how_to_get_it(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    expected = (
        "model-signing, which makes and checks signatures, is not installed\n"
        "  in the environment\n"
        "  fix: pip install --constraint constraints.txt --editable '.[signing]'"
    )
    assert fail_to_sign() == expected
    assert fail_to_check() == expected
