"""Rated sentences of film reviews, product reviews and editorials, from the index.

From the source distribution of vaderSentiment (MIT); each is rated from -4 to 4, by
twenty people.

References: Hutto and Gilbert 2014. https://doi.org/10.1609/icwsm.v8i1.14550
"""

import io
import os
import pathlib
import tarfile

import fetch

from flora import LoraError

DATA = "vaderSentiment", "3.3.2"
DATA_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"


def rated(
    source: str,
    folder: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> list[tuple[str, float, str]]:
    """Sentences, their mean ratings and their names, such as 3_1 for one of text 3.

    Args:
      source: "movieReview", "amazonReview" or "nytEditorial".
      folder: vaderSentiment's unpacked source distribution; fetched for `None`.
      cache: as for `fetch.sdist`.
    """
    folder = folder or fetch.sdist(*DATA, sha256=DATA_SHA256, cache=cache)
    path = pathlib.Path(folder) / "additional_resources" / "hutto_ICWSM_2014.tar.gz"
    if not path.is_file():
        raise LoraError(
            f"{path} is not there. Pass the folder of vaderSentiment's unpacked source "
            "distribution; its wheel does not have the sentences."
        )
    with tarfile.open(path) as archive:
        member = f"hutto_ICWSM_2014/{source}Snippets_GroundTruth.txt"
        file = archive.extractfile(member)
        assert file is not None
        lines = io.TextIOWrapper(file, "utf-8", errors="replace").read().split("\n")
    rows = [line.split("\t", 2) for line in lines if line.strip()]
    return [(text.strip(), float(rating), name) for name, rating, text in rows]
