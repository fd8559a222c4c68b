"""Heads on the Hugging Face hub: a `heads.json` in its own model repository."""

from __future__ import annotations

import json
import re
from pathlib import Path

from localization_heads.data.network import client_trouble
from localization_heads.errors import UsageError, WorkError
from localization_heads.heads.record import HeadRanking
from localization_heads.store.results import load_ranking

FILE = "heads.json"
_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def is_repository(name: str) -> bool:
    """Whether a name can be a hub repository: `user/repo`, and not the path of an existing file.

    >>> is_repository("user/heads-of-llava"), is_repository("outputs/tiny/heads.json")
    (True, False)
    """
    return bool(_REPOSITORY.fullmatch(name)) and not name.endswith(".json") and not Path(name).exists()


def load_heads(source: str | Path, *, revision: str | None = None) -> HeadRanking:
    """A ranking from a `heads.json` on this machine, or from a hub repository `"user/repo"`.

    Only that one JSON file is fetched and read; nothing in the repository is run.

    Raises:
        UsageError: the file is not a ranking, or the name is neither a file nor a repository.
        WorkError: the hub does not answer or does not have it.
    """
    if is_repository(str(source)):
        return load_ranking(_fetched(str(source), revision))
    return load_ranking(source)


def push_heads(
    ranking: HeadRanking, repository: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Write `heads.json`, and a card with the ranking, into a hub repository, which is created if necessary.

    Args:
        repository: `"user/repo"`.
        token: None takes the one of `hf auth login`.

    Returns:
        The address of the commit.

    Raises:
        UsageError: a name that no repository can have.
        WorkError: the hub refuses or does not answer.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi(token=token)
    text = json.dumps(ranking.to_json(), indent=2) + "\n"
    files = {FILE: text, "README.md": card(ranking, repository)}
    additions = [CommitOperationAdd(name, content.encode()) for name, content in files.items()]
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(repository, additions, commit_message=f"Heads of {ranking.model}")
    except HFValidationError as error:
        raise UsageError(f"{repository}: {error}") from None
    except (OSError, ConnectionError, TimeoutError, ImportError, ValueError, httpx.InvalidURL) as error:
        raise _failed(repository, "cannot be written", error) from error
    return str(commit.commit_url)


def card(ranking: HeadRanking, repository: str) -> str:
    """The repository's front page: the heads' model, how they were found, how to use them."""
    base = f"base_model: {json.dumps(ranking.model)}\n" if ranking.model.count("/") == 1 else ""
    rows = "".join(
        f"| {h.layer} | {h.head} | {h.selection_frequency:.3f} | {h.attention_sum:.3f} |\n"
        for h in ranking.kept[:10]
    )
    return f"""---
library_name: localization-heads
{base}tags: [localization-heads, attention, visual-grounding]
---
# Localization heads of {ranking.model}

{_how(ranking)}

```python
import localization_heads as lh
ranking = lh.load_heads("{repository}")
```

| layer | head | selection frequency | attention sum |
| --- | --- | --- | --- |
{rows}"""


def _how(ranking: HeadRanking) -> str:
    if by := (ranking.found_with or {}).get("heads_by"):
        return f"Found by labels ({by}) on {ranking.num_samples} samples."
    return f"Found by selection frequency over {ranking.num_trials} x {ranking.num_samples} samples, without labels."


def _fetched(repository: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    from localization_heads.lvlm.checkpoints.sources import hub_trouble

    try:
        return Path(
            hf_hub_download(repository, FILE, revision=revision, local_files_only=hub_trouble() is not None)
        )
    except HFValidationError as error:
        raise UsageError(f"heads={repository}: {error}") from None
    except (OSError, ConnectionError, TimeoutError) as error:
        raise _failed(
            f"heads={repository}", "is neither a file here nor to be had from the hub", error
        ) from error


def _failed(what: str, how: str, error: Exception) -> WorkError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return WorkError(f"{what} {how} ({client_trouble() or lines[0][:200]})")
