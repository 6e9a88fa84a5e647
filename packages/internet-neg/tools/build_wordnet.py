"""Make the vocabulary that the package carries from a WordNet 3.0 database.

Debian's package wordnet-base has one:

    python packages/internet-neg/tools/build_wordnet.py --wordnet-dir /usr/share/wordnet
"""

import argparse
from pathlib import Path

from internet_neg.vocabulary import read_wordnet_folder, write_rows

DATA = Path(__file__).resolve().parents[1] / "src" / "internet_neg" / "data"


def main() -> None:
    """Write the table, and the licence notice that the database begins with."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--wordnet-dir", type=Path, default=Path("/usr/share/wordnet"))
    folder = parser.parse_args().wordnet_dir
    rows = read_wordnet_folder(folder)
    write_rows(DATA / "wordnet.tsv.gz", rows)
    lines = (folder / "data.noun").read_text(encoding="utf-8").splitlines()
    notice = [line.split(" ", 3)[3].rstrip() for line in lines if line.startswith("  ")]
    changes = (
        "The file wordnet.tsv.gz beside this notice is derived from WordNet 3.0: the first lemma\n"
        "of every noun and adjective synset in lower case, with its lexicographer file.\n\n"
    )
    (DATA / "WORDNET_LICENSE").write_text(changes + "\n".join(notice).strip() + "\n")
    print(f"{len(rows)} rows, {(DATA / 'wordnet.tsv.gz').stat().st_size} bytes")


if __name__ == "__main__":
    main()
