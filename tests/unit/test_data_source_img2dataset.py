"""What img2dataset 1.47 really wrote (tests/data/img2dataset) is packed as it is, and its failures are counted."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from shard_factory import encode, noise, plain, write_tar

from blip2train.batch import to_image_id
from blip2train.data.pack import pack
from blip2train.data.sample import read_eval_items
from blip2train.data.source.base import load
from blip2train.data.source.img2dataset import Img2DatasetSource, failure_cause
from blip2train.errors import DataError

WRITTEN = Path(__file__).parents[1] / "data" / "img2dataset"


def records(source: Img2DatasetSource) -> list[tuple[str, dict[str, Any], bytes]]:
    found = []
    for row in source.rows():
        loaded = load(row)
        assert isinstance(loaded, tuple), loaded
        found.append((row.key, *loaded))
    return found


def test_tars_and_files_hold_the_same_records() -> None:
    tars, files = (Img2DatasetSource(WRITTEN / name, kind="cc3m") for name in ("webdataset", "files"))
    assert tars.count() == files.count() == 6
    assert sorted(records(tars), key=lambda record: record[0]) == records(files)
    # in the tar as they were downloaded
    assert [record[0] for record in records(tars)] == ["000002", "000001", "000000", "000003", "000004", "000010"]
    assert not tars.skipped.counts and not files.skipped.counts


def test_a_record_keeps_what_says_something_of_the_image() -> None:
    key, fields, image = records(Img2DatasetSource(WRITTEN / "files"))[0]
    digest = "608fe84d5e898ef8a0023eb3caf914885eeec9468ddfab9b60ba55f81d719703"
    assert (key, fields) == (
        "000000",
        {
            "captions": ["A big burly grizzly bear is show with grass in the background."],
            "image_id": int(digest[:15], 16),
            "similarity": 0.3,
            "url": "http://127.0.0.1:8791/000000000285.jpg",
            "original_width": 234,
            "original_height": 256,
            "sha256": digest,
        },
    )
    assert 0 < fields["image_id"] < 1 << 63
    assert image == (WRITTEN / "files" / "00000" / "000000.jpg").read_bytes()


def test_failed_downloads_are_counted_by_cause() -> None:
    assert Img2DatasetSource(WRITTEN / "webdataset").notes() == {
        "downloads": {
            "urls": 9, "images": 6, "failed": {"unknown_host": 1, "not_decodable": 1, "http_404": 1},
        }
    }  # fmt: skip


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("HTTP Error 403: Forbidden", "http_403"),
        ("HTTP Error 404: File not found", "http_404"),
        ("<urlopen error [Errno -2] Name or service not known>", "unknown_host"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "unknown_host"),
        ("<urlopen error timed out>", "timeout"),
        ("The read operation timed out", "timeout"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed (_ssl.c:1129)>", "certificate"),
        ("<urlopen error [Errno 111] Connection refused>", "connection"),
        ("Remote end closed connection without response", "connection"),
        ("Image decoding error", "not_decodable"),
        ("image too small", "not_wanted"),
        ("aspect ratio too large", "not_wanted"),
        ("Use of image disallowed by X-Robots-Tag directive", "opted_out"),
        ("hash mismatch", "hash_mismatch"),
        ("unknown url type: 'www.x.com/a.jpg'", "bad_url"),
        ("something new", "other"),
    ],
)
def test_messages_of_img2dataset_have_short_names(message: str, cause: str) -> None:
    assert failure_cause(message) == cause


def test_several_runs_lie_side_by_side_and_our_shards_are_none_of_them(tmp_path: Path) -> None:
    for part in ("part-0", "part-1"):
        shutil.copytree(WRITTEN / "webdataset", tmp_path / part)
    write_tar(tmp_path / "out" / "shard-000000.tar", [("a.jpg", b"x")])
    source = Img2DatasetSource(tmp_path, kind="laion", ignored=[tmp_path / "out"])
    keys = [row.key for row in source.rows()]
    assert len(keys) == len(set(keys)) == source.count() == 12
    assert keys[0] == "part-0/000002" and keys[6] == "part-1/000002"
    assert source.notes()["downloads"]["urls"] == 18


def test_without_a_hash_the_id_is_of_this_data_set(tmp_path: Path) -> None:
    content = json.dumps({"caption": "x", "url": "u", "sha256": None}).encode()
    write_tar(tmp_path / "00000.tar", [("000000000.webp", b"image"), ("000000000.json", content)])
    source = Img2DatasetSource(tmp_path, kind="coyo")
    assert records(source) == [("000000000", {"captions": ["x"], "url": "u", "image_id": "coyo/000000000"}, b"image")]
    assert source.count() is None and source.notes()["downloads"]["shards_without_counts"] == 1


def test_tars_that_count_from_zero_each_lose_nothing_and_share_no_id(tmp_path: Path) -> None:
    for shard in range(2):
        files = [("0.png", encode(noise(shard))), ("0.json", json.dumps({"caption": f"shard {shard}"}).encode())]
        write_tar(tmp_path / "in" / f"{shard:05d}.tar", files)
    manifest = pack(Img2DatasetSource(tmp_path / "in", kind="coyo"), tmp_path / "out")
    assert (manifest["num_records"], manifest["skipped"]) == (2, {})
    packed = [(item.captions, item.key, item.image_id) for item in read_eval_items(str(tmp_path / "out"), plain)]
    later = f"0-{hashlib.blake2b(b'00001.tar/0', digest_size=4).hexdigest()}"
    expected = [(("shard 0",), "0"), (("shard 1",), later)]
    assert packed == [(captions, key, to_image_id(f"coyo/{key}")) for captions, key in expected]


def test_an_id_saved_with_the_images_is_theirs(tmp_path: Path) -> None:
    content = json.dumps({"captions": ["x"], "image_id": 42, "sha256": "0" * 64}).encode()
    write_tar(tmp_path / "00000.tar", [("7.jpg", b"image"), ("7.json", content)])
    assert records(Img2DatasetSource(tmp_path))[0][1]["image_id"] == 42


def test_a_tar_that_is_cut_off_gives_what_is_whole_and_counts_the_rest(tmp_path: Path) -> None:
    shutil.copytree(WRITTEN / "webdataset", tmp_path / "cut")
    path = tmp_path / "cut" / "00000.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    source = Img2DatasetSource(tmp_path / "cut")
    found = records(source)
    assert 1 < len(found) < 6
    lost = sum(source.skipped.counts.values())
    assert len(found) + lost == 6 and "missing_in_shard" in source.skipped.counts
    assert source.notes()["damaged_shards"][0].startswith("00000.tar: ")
    assert Img2DatasetSource(tmp_path / "cut").identity() != Img2DatasetSource(WRITTEN / "webdataset").identity()


def test_an_image_with_other_files_only_or_none_is_counted(tmp_path: Path) -> None:
    files = [("0.jpg", b"image"), ("0.txt", "café".encode()), ("1.txt", b"no image"), ("2.jpg", b"no text")]
    write_tar(tmp_path / "00000.tar", files)
    source = Img2DatasetSource(tmp_path)
    assert [load(row) for row in source.rows()] == [
        ({"captions": ["café"], "image_id": "img2dataset/0"}, b"image"), "no_caption",
    ]  # fmt: skip
    assert dict(source.skipped.counts) == {"missing_image": 1}


def test_another_folder_says_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("images inside a Parquet")
    with pytest.raises(DataError, match=r"neither NNNNN\.tar[\s\S]*--output_format webdataset or files"):
        Img2DatasetSource(tmp_path)
    with pytest.raises(DataError, match=r"^a file\n[\s\S]*a list of urls is fetched first"):
        Img2DatasetSource(tmp_path / "x.parquet")
    with pytest.raises(DataError, match="no folder"):
        Img2DatasetSource(tmp_path / "gone")
    with pytest.raises(DataError, match="no counts of img2dataset"):
        write_tar(tmp_path / "00000.tar", [("0.jpg", b"image")])
        (tmp_path / "00000_stats.json").write_text("{}")
        Img2DatasetSource(tmp_path)


def test_the_files_are_those_img2dataset_wrote() -> None:
    """Their hashes: a checkout that changes line ends or drops a file is noticed here."""
    digest = hashlib.sha256()
    for path in sorted(WRITTEN.rglob("*.jpg")):
        digest.update(path.read_bytes())
    assert len(list(WRITTEN.rglob("*.jpg"))) == 6
    assert digest.hexdigest() == "e19d3527b506ed63411d40c4d8e0b8f3c42cc8683d95571082798da52fce3641"
