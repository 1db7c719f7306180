"""Files of data sets on the Hugging Face hub, kept in its cache."""

import fnmatch
import functools
import os
from pathlib import Path

from mobilellm_jax.errors import UserError

_DEFAULT = ("*train*.parquet", "*.parquet")  # without a pattern, the first of these that any file matches


@functools.cache  # a sweep opens it for every run
def download(spec: str, field: str) -> tuple[str, ...]:
    """Downloads "<owner>/<name>[@<revision>][/<pattern>]" at first use; gives the paths of the files, sorted.

    In a pattern, * also matches /. Errors begin with `field`.

    Raises:
      UserError: the spec is not of this form, the hub cannot be reached and has not been before, there is no
        such data set, or none of its files matches.
    """
    import huggingface_hub  # here: other sources need not spend the time
    from huggingface_hub import errors

    what = f"{field}: 'hub:{spec}'"
    owner, _, rest = spec.partition("/")
    name, _, pattern = rest.partition("/")
    name, _, revision = name.partition("@")
    if not owner or not name:
        raise UserError(f"{what}: expected hub:<owner>/<name>, or hub:<owner>/<name>/<pattern of files>")
    patterns = (pattern,) if pattern else _DEFAULT
    for wanted in patterns:
        try:
            folder = huggingface_hub.snapshot_download(
                f"{owner}/{name}", repo_type="dataset", revision=revision or None, allow_patterns=wanted
            )
        except errors.RepositoryNotFoundError:
            raise UserError(f"{what}: the hub has no such data set, or it is private") from None
        except Exception as error:  # of the network, the hub and the disk: they have no type in common
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"{what}: cannot be downloaded: {type(error).__name__}: {reason}; the first use needs the "
                "network, or a copy in the cache of the hub (HF_HOME)"
            ) from None
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        there = {path.relative_to(folder).as_posix(): str(path) for path in files}
        if found := [path for file, path in there.items() if fnmatch.fnmatchcase(file, wanted)]:
            return tuple(found)
    raise UserError(
        f"{what}: no file matches {patterns[-1]!r}; see its files at "
        f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/datasets/{owner}/{name}/tree/main"
    )
