"""Putting a trained model on the Hugging Face hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rlkit.errors import UserError
from rlkit.lm.trainer import LMTrainer
from rlkit.trainer import load


def push(run: str, repo: str, *, private: bool = True, merged: bool = False) -> str:
    """Upload the newest checkpoint of `run` as a model folder; returns its address.

    Args:
        run: run folder, checkpoint or saved folder.
        repo: `user/name`; made if it is not there.
        private: make a new repository private.
        merged: upload an adapter merged into its model.

    Raises:
        UserError: not a language model, or the hub refused (no login, no network, no such name).
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    trainer = load(run, inference=True)
    if not isinstance(trainer, LMTrainer):
        raise UserError(f"{run} was trained by `{trainer.name}`: the hub takes language models")
    with tempfile.TemporaryDirectory() as place:
        folder = trainer.save(Path(place) / "model", merged=merged)
        try:
            api = HfApi()
            address = api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message=f"rlkit {trainer.name}")
        except (HTTPError, HFValidationError, OSError) as error:  # no login, no network, no such name
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"cannot push to {repo}: {reason}; log in with `hf auth login`, and check the name and the network"
            ) from error
    return str(address)
