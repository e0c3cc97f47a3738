"""Which token a head with identities answers with: each image's own, the mean, or one of a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from featstore.errors import invalid, not_found
from heads.identity_token import IdentityToken
from heads.model import Model
from heads.predictions import Predict, predict_pairs, predict_unnamed
from heads.runs import Run
from heads.token_file import noted_support, read_token, use_token

OWN, MEAN = "own", "mean"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenToken:
    """How a model answers from now on."""

    name: str  # "own", "mean" or the file
    predict: Predict
    identity: str | None = None  # whom the file is of
    support: frozenset[str] = frozenset()  # of what it has learned from, see `support_of`


OWN_TOKEN = ChosenToken(name=OWN, predict=predict_pairs)


def choose_token(model: Model, run: Run, token: str | Path) -> ChosenToken:
    """Let a model answer with a token.

    Args:
        model: Of the run.
        run: Run.
        token: "own", "mean" or a token file, see `heads.evaluate.evaluate`.

    Raises:
        InvalidInputError: The head takes no token, or that of the file is of another run.
        NotFoundError: There is no such file.
    """
    if token == OWN:
        return OWN_TOKEN
    if token == MEAN:
        head_with_tokens(model)
        return ChosenToken(name=MEAN, predict=predict_unnamed)
    saved = read_token(token)
    use_token(model, run, saved)
    return ChosenToken(
        name=str(token),
        predict=predict_unnamed,
        identity=saved.identity,
        support=saved.support or noted_support(run, Path(token)),
    )


def use_trained_token(model: Model, identity: str) -> None:
    """Let a model answer as for an identity that was trained.

    Raises:
        InvalidInputError: The head takes no token.
        NotFoundError: The identity was not trained.
    """
    head = head_with_tokens(model)
    known = model.task.identities
    if identity not in known or head.tokens is None:
        hint = "For another one name a --token file, which `heads adapt` makes."
        raise not_found("trained identity", identity, known, hint=hint)
    head.set_token(head.tokens[known.index(identity)])


def head_with_tokens(model: Model) -> IdentityToken:
    """Give the head of a model that must take tokens.

    Raises:
        InvalidInputError: It takes none.
    """
    if not isinstance(model.head, IdentityToken):
        given = type(model.head).__name__
        raise invalid("token", given, "left out: only the head identity_token takes one")
    return model.head
