"""PDFs written by hand, whose every line, rule and curve is where the test says."""

from pathlib import Path

WIDTH, HEIGHT = 600, 800  # points; a page of 800 pixels has one for each
FONTS = {"plain": "Helvetica", "bold": "Helvetica-Bold", "mono": "Courier", "math": "Symbol"}


def text(words: str, x: float, y: float, font: str = "plain", size: float = 10) -> str:
    """Content that writes words from x on, with their baseline y points above the page's bottom."""
    return f"BT /{font} {size} Tf {x} {y} Td ({words}) Tj ET\n"


def rectangle(x: float, y: float, width: float, height: float) -> str:
    return f"{x} {y} {width} {height} re f\n"


def disk(x: float, y: float, radius: float) -> str:
    k = 0.5523 * radius
    return (
        f"{x + radius} {y} m {x + radius} {y + k} {x + k} {y + radius} {x} {y + radius} c "
        f"{x - k} {y + radius} {x - radius} {y + k} {x - radius} {y} c "
        f"{x - radius} {y - k} {x - k} {y - radius} {x} {y - radius} c "
        f"{x + k} {y - radius} {x + radius} {y - k} {x + radius} {y} c f\n"
    )


def paragraph(top: float, lines: int, words: str = "Words of a paragraph that go on and on over the line", **kw) -> str:
    return "".join(text(f"{words} {number}", 72, top - 12 * number, **kw) for number in range(lines))


def write_pdf(
    path: Path,
    contents: list[str],
    *,
    size: tuple[float, float] = (WIDTH, HEIGHT),
    author: str = "",
    trailer: str = "",
    resources: str = "",
) -> Path:
    """Writes a PDF with a page for each stream of content."""
    fonts = " ".join(f"/{name} << /Type /Font /Subtype /Type1 /BaseFont /{base} >>" for name, base in FONTS.items())
    kids = [4 + 2 * number for number in range(len(contents))]
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{' '.join(f'{kid} 0 R' for kid in kids)}] /Count {len(kids)} >>",
        f"<< /Author ({author}) >>",
    ]
    for kid, content in zip(kids, contents, strict=True):
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {size[0]} {size[1]}] /Contents {kid + 1} 0 R "
            f"/Resources << /Font << {fonts} >> {resources} >> >>",
            f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
        ]
    data, places = "%PDF-1.4\n", []
    for number, entry in enumerate(objects, 1):
        places.append(len(data))
        data += f"{number} 0 obj\n{entry}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    data += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    data += (
        f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R /Info 3 0 R {trailer} >>\nstartxref\n{data.index('xref')}\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((data + "%%EOF\n").encode("latin-1"))
    return path


def article(number: int = 0) -> str:
    """A page of every class but tables and figures."""
    return (
        text("A running header", 72, 775)
        + text(f"Heading {number}", 72, 730, "bold", 14)
        + paragraph(700, 8, f"Words of paragraph {number} that go on and on over the line")
        + "".join(text(f"code = call{line}(argument)", 90, 590 - 12 * line, "mono") for line in range(5))
        + text("abcdefghijk", 250, 500, "math", 12)
        + paragraph(470, 6)
        + text(str(number), 300, 30)
    )


def write_library(folder: Path, packages: int = 6) -> Path:
    """A folder of packages with two documents of two pages each."""
    for package in range(packages):
        for name in ("manual", "example"):
            number = 10 * package + (name == "manual")
            pages = [article(number), article(number + 100)]
            write_pdf(folder / f"package{package}" / f"{name}.pdf", pages, author=f"Writer of package {package}")
    return folder
