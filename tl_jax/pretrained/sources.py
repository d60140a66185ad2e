"""From a `source` to a file: a path, `shipped:NAME`, or `hf://org/repo[@revision][/file]`."""

import os
import re
from pathlib import Path

from tl_jax.errors import UserError, nearest

SHIPPED = Path(__file__).parent / 'shipped'
HUB = re.compile(r'hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<file>.+))?')
# What a repository is likely to call its weights, best first.
HUB_FILES = ('model.safetensors', 'pytorch_model.bin')


def locate(source: str | os.PathLike) -> Path:
    """Returns the local file that a source names, fetched from the hub into its cache if need be.

    Raises:
      UserError: there is no such file, or the hub cannot be reached and the cache does not hold it.
    """
    source = os.fspath(source)
    if source.startswith('hf://'):
        return _from_hub(source)
    if source.startswith('shipped:'):
        path = SHIPPED / f'{source.removeprefix("shipped:")}.safetensors'
        if not path.is_file() or path.parent != SHIPPED:
            known = [f'shipped:{file.stem}' for file in SHIPPED.glob('*.safetensors')]
            raise UserError(f"source '{source}': tl_jax ships no such weights; {nearest(source, known)}")
        return path
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"source '{source}': there is no such file; {_nearby(path)}")
    if not path.is_file():
        raise UserError(f"source '{source}': not a regular file; name a file of weights; {_nearby(path / 'x')}")
    return path


def _nearby(path: Path) -> str:
    """A suggestion for a missing path: the nearest file of its folder, or the nearest folder that exists."""
    folder = path.parent
    if not folder.is_dir():
        existing = next(parent for parent in folder.absolute().parents if parent.is_dir())
        return f'nor the folder {folder}; the nearest that exists is {existing}'
    return f'in {folder.absolute()}: {nearest(path.name, (file.name for file in folder.iterdir()))}'


def _from_hub(source: str) -> Path:
    match = HUB.fullmatch(source)
    if not match or '..' in source:
        raise UserError(f"source '{source}': write hf://org/repo, hf://org/repo@revision or hf://org/repo/file")
    # Imported here: only this kind of source needs it, and it takes half a second.
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    repo, revision = match['repo'], match['revision']
    files = [match['file']] if match['file'] else HUB_FILES
    for file in files:
        try:
            return Path(hub.hf_hub_download(repo, file, revision=revision))
        except errors.LocalEntryNotFoundError:
            folder = Path(constants.HF_HUB_CACHE) / f'models--{repo.replace("/", "--")}' / 'snapshots'
            raise UserError(
                f"source '{source}': the hub cannot be reached and its cache {folder} has no {file!r}; fetch it where "
                'there is a network, then put it into that cache or give its path as the source'
            ) from None
        except errors.RevisionNotFoundError:
            raise UserError(f"source '{source}': the repository has no revision '{revision}'") from None
        except errors.RepositoryNotFoundError:
            raise UserError(
                f"source '{source}': the hub has no such repository, or it needs a login (HF_TOKEN)"
            ) from None
        except errors.EntryNotFoundError:
            continue
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
            raise UserError(f"source '{source}': the hub refused: {' '.join(str(error).split()):.200}") from None
    raise UserError(f"source '{source}': the repository has none of {', '.join(files)}; name one, hf://{repo}/FILE")
