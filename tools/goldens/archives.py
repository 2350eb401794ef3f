"""Writes test/goldens/archives.json: small ZIP and tar archives made by Python's own modules.

Usage: python tools/goldens/archives.py > test/goldens/archives.json
"""

import base64
import io
import json
import tarfile
import zipfile

BODY = bytes(range(256)) * 40
LONG = "package/" + "d" * 120 + "/" + "e" * 120 + "/model.gguf"
FIXED = (2020, 1, 1, 0, 0, 0)


class Pipe(io.RawIOBase):
    """A sink without seek: zipfile then writes sizes after the data, as streaming writers do."""

    def __init__(self):
        self.parts = []

    def writable(self):
        return True

    def write(self, data):
        self.parts.append(bytes(data))
        return len(data)


def make_zip(method, force64=False, stream=False, comment=b""):
    out = Pipe() if stream else io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, body in (("a/first.txt", b"first\n"), ("a/model.gguf", BODY), ("a/empty", b"")):
            info = zipfile.ZipInfo(name, FIXED)
            info.compress_type = method
            with archive.open(info, "w", force_zip64=force64) as entry:
                entry.write(body)
        archive.comment = comment
    return b"".join(out.parts) if stream else out.getvalue()


def end64(data):
    """The same archive with a 64-bit end of directory, as archives over 4 GiB have."""
    at = data.rindex(b"PK\x05\x06")
    count = int.from_bytes(data[at + 10 : at + 12], "little")
    size = int.from_bytes(data[at + 12 : at + 16], "little")
    offset = int.from_bytes(data[at + 16 : at + 20], "little")
    word = lambda value, length: value.to_bytes(length, "little")
    record = b"PK\x06\x06" + word(44, 8) + word(45, 2) * 2 + word(0, 4) * 2
    record += word(count, 8) * 2 + word(size, 8) + word(offset, 8)
    locator = b"PK\x06\x07" + word(0, 4) + word(at, 8) + word(1, 4)
    last = b"PK\x05\x06" + word(0, 4) + b"\xff" * 12 + word(0, 2)
    return data[:at] + record + locator + last


def make_tar(layout):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", format=layout) as archive:
        for name, body in (("package/package.json", b"{}\n"), (LONG, BODY), ("package/last", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return out.getvalue()


archives = {
    "stored": make_zip(zipfile.ZIP_STORED),
    "deflated": make_zip(zipfile.ZIP_DEFLATED, comment=b"a comment"),
    "zip64": end64(make_zip(zipfile.ZIP_DEFLATED, force64=True)),
    "streamed": make_zip(zipfile.ZIP_DEFLATED, stream=True),
    "pax": make_tar(tarfile.PAX_FORMAT),
    "gnu": make_tar(tarfile.GNU_FORMAT),
}
print(json.dumps({name: base64.b64encode(data).decode() for name, data in archives.items()}, indent=1))
