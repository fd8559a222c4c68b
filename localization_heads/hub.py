"""Rankings on the Hugging Face hub: a `heads.json` and a model card in a model repository."""

from __future__ import annotations

import json
import re
from pathlib import Path

from localization_heads.data.network import client_problem
from localization_heads.errors import UsageError, WorkError
from localization_heads.heads.record import HeadRanking
from localization_heads.store.results import load_ranking

FILE = "heads.json"
_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def is_repository(name: str) -> bool:
    """Whether a name looks like a hub repository, `user/repo`, and is not the path of an existing file.

    >>> is_repository("user/heads-of-llava"), is_repository("outputs/tiny/heads.json")
    (True, False)
    """
    return bool(_REPOSITORY.fullmatch(name)) and not name.endswith(".json") and not Path(name).exists()


def load_heads(source: str | Path, *, revision: str | None = None) -> HeadRanking:
    """Load a ranking from a local `heads.json` or from a hub repository `"user/repo"`.

    Only that JSON file is downloaded; no code of the repository is executed.

    Raises:
        UsageError: the file is not a ranking, or the name is neither a file nor a repository.
        WorkError: the hub does not respond or has no such file.
    """
    if is_repository(str(source)):
        return load_ranking(_download(str(source), revision))
    return load_ranking(source)


def push_heads(ranking: HeadRanking, repository: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Upload `heads.json` and a model card to a hub repository, which is created if necessary.

    Args:
        repository: `"user/repo"`.
        token: an access token; None uses the one of `hf auth login`.

    Returns:
        The URL of the commit.

    Raises:
        UsageError: an invalid repository name.
        WorkError: the hub refuses the upload or does not respond.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi(token=token)
    heads_json = json.dumps(ranking.to_json(), indent=2) + "\n"
    files = {FILE: heads_json, "README.md": card(ranking, repository)}
    additions = [CommitOperationAdd(name, content.encode()) for name, content in files.items()]
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(repository, additions, commit_message=f"Heads of {ranking.model}")
    except HFValidationError as error:
        raise UsageError(f"{repository}: {error}") from None
    except (OSError, ConnectionError, TimeoutError, ImportError, ValueError, httpx.InvalidURL) as error:
        raise _hub_error(f"{repository} cannot be written", error) from error
    return str(commit.commit_url)


def card(ranking: HeadRanking, repository: str) -> str:
    """The model card (README.md): the model, how its heads were found, how to load them."""
    base_model = f"base_model: {json.dumps(ranking.model)}\n" if ranking.model.count("/") == 1 else ""
    rows = "".join(
        f"| {h.layer} | {h.head} | {h.selection_frequency:.3f} | {h.attention_sum:.3f} |\n" for h in ranking.kept[:10]
    )
    return f"""---
library_name: localization-heads
{base_model}tags: [localization-heads, attention, visual-grounding]
---
# Localization heads of {ranking.model}

{_how_found(ranking)}

```python
import localization_heads as lh
ranking = lh.load_heads("{repository}")
```

| layer | head | selection frequency | attention sum |
| --- | --- | --- | --- |
{rows}"""


def _how_found(ranking: HeadRanking) -> str:
    if heads_by := (ranking.found_with or {}).get("heads_by"):
        return f"Found by labels ({heads_by}) on {ranking.num_samples} samples."
    return f"Found by selection frequency over {ranking.num_trials} x {ranking.num_samples} samples, without labels."


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    from localization_heads.lvlm.checkpoints.sources import hub_unreachable_reason

    try:
        return Path(
            hf_hub_download(repository, FILE, revision=revision, local_files_only=hub_unreachable_reason() is not None)
        )
    except HFValidationError as error:
        raise UsageError(f"heads={repository}: {error}") from None
    except (OSError, ConnectionError, TimeoutError) as error:
        problem = f"heads={repository} is neither a local file nor available from the hub"
        raise _hub_error(problem, error) from error


def _hub_error(problem: str, error: Exception) -> WorkError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return WorkError(f"{problem} ({client_problem() or lines[0][:200]})")
