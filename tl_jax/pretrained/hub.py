"""`hf://org/repo[@revision][/file]`: files of the Hugging Face hub, through its cache, which also serves them offline."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from absl import logging
from huggingface_hub import constants, errors

from tl_jax.errors import UserError
from tl_jax.pretrained import sharded

SOURCE = re.compile(r'hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<file>.+))?')


class Place(NamedTuple):
    source: str
    repo: str
    revision: str | None


def fetch(source: str, weights: Sequence[str]) -> Path:
    """Returns the cached file that a source names, or the first of `weights` there; an index with all of its shards.

    Raises:
      UserError: the hub has no such thing, or cannot be reached while its cache does not hold it.
    """
    match = SOURCE.fullmatch(source)
    if not match or '..' in source:
        raise UserError(f"source '{source}': write hf://org/repo, hf://org/repo@revision or hf://org/repo/file")
    place, offline = Place(source, match['repo'], match['revision']), False
    files = [match['file']] if match['file'] else weights
    for file in files:
        try:
            path = _download(place, file, offline)
        except errors.LocalEntryNotFoundError:
            offline = True  # The cache may have the other names; to try the network for each would only take time.
        except errors.EntryNotFoundError:
            continue
        else:
            if file.endswith(sharded.SUFFIX):
                _fetch_shards(place, path, file, offline)
            _fetch_config(place, path, file, offline)
            return path
    if offline:
        raise _unreachable(place, ', '.join(files))
    raise UserError(
        f"source '{source}': the repository has none of {', '.join(files)}; name one, hf://{place.repo}/FILE"
    )


def _fetch_config(place: Place, weights: Path, file: str, offline: bool) -> None:
    """Fetches the `config.json` beside the weights, if there is one: it states the network's sizes."""
    pinned = place._replace(revision=weights.parents[file.count('/')].name)
    name = file.removesuffix(weights.name) + 'config.json'
    try:
        _download(pinned, name, offline)
    except errors.LocalEntryNotFoundError:
        logging.warning('%s: no %s in the cache; the sizes are those of the architecture', place.source, name)
    except errors.EntryNotFoundError:
        pass  # the repository has none


def _fetch_shards(place: Place, index: Path, file: str, offline: bool) -> None:
    """Fetches the shards beside an index, from its commit: the name of its snapshot's folder. The revision may move on."""
    pinned = place._replace(revision=index.parents[file.count('/')].name)
    folder = file.removesuffix(index.name)
    for shard in sorted(set(sharded.weight_map(index).values())):
        try:
            _download(pinned, folder + shard, offline)
        except errors.LocalEntryNotFoundError:
            raise _unreachable(place, f'{folder + shard!r} of {index.name}') from None
        except errors.EntryNotFoundError:
            raise UserError(
                f"source '{place.source}': {index.name} names the shard {shard!r:.80}, which the repository lacks"
            ) from None


def _download(place: Place, file: str, offline: bool) -> Path:
    """Returns the cached file. Raises (Local)EntryNotFoundError where there is none, UserError on any other refusal."""
    try:
        cached = huggingface_hub.hf_hub_download(place.repo, file, revision=place.revision, local_files_only=offline)
    except errors.EntryNotFoundError:
        raise
    except errors.RevisionNotFoundError:
        raise UserError(f"source '{place.source}': the repository has no revision '{place.revision}'") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"source '{place.source}': the hub has no such repository, or it needs a login (HF_TOKEN)"
        ) from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        why = ' '.join(str(error).split())
        raise UserError(
            f"source '{place.source}': the hub refused ({why:.200}); check the name and the login"
        ) from None
    return Path(cached)


def _unreachable(place: Place, files: str) -> UserError:
    folder = Path(constants.HF_HUB_CACHE) / f'models--{place.repo.replace("/", "--")}' / 'snapshots'
    return UserError(
        f"source '{place.source}': the hub cannot be reached and its cache {folder} has no {files}; fetch it where "
        'there is a network, then put it into that cache or give its path as the source'
    )
