"""Answer a question from a state, which stays as it is.

The question is read like more of the stream, by a copy; the answer is the likeliest token at every
place, up to <|stop|>. The probability of <|unknown|> in its place says how likely it is that
nothing was said. Only where that is all but certain there is no answer; below a threshold, chosen
on validation data, an answer is a guess. What the store was read for while answering shows where it
comes from.

Shapes: H heads, S places.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wakesleep.streams.errors import Refused
from wakesleep.streams.language_model import LanguageModel
from wakesleep.streams.prompts import STOP, UNKNOWN, decode_answer, encode_question
from wakesleep.streams.tokenizer import NUM_SPECIAL
from wakesleep.ttl.ready import Ready
from wakesleep.ttl.state import SPAN, SPAN_AFTER, StreamState

MAX_ANSWER = 16  # tokens
MAX_PASSAGES = 5
LEAST_PROBABILITY = 0.05  # that there is an answer at all, for one to be given
MAX_PAIRS = 64  # stored pairs that are looked at, the most read first


class Answer(NamedTuple):
    question: str
    answer: str  # the likeliest one, a guess if it is not `known`; "" if nothing was said of it
    confidence: float  # 0 to 1
    known: bool  # an answer, and a confidence that reaches the model's threshold
    tokens: int  # that the state has read
    passages: list[dict[str, Any]]  # position, text, mass: most read first


class Reply(NamedTuple):
    """An answer before anybody looks where it comes from."""

    text: str
    confidence: float
    known: bool
    state: StreamState  # of the copy, after the answer; its read mass is that of the answer alone
    queries: int  # tokens that read for the answer


@torch.inference_mode()
def ask(language_model: LanguageModel, state: StreamState, question: str) -> Answer:
    """Answer `question` from a state of one lane, with the passages that were read for it.

    Raises:
        Refused: the question is empty, or longer than the window.
    """
    reply = reply_to(language_model, state, question)
    return Answer(
        question=question,
        answer=reply.text,
        confidence=reply.confidence,
        known=reply.known,
        tokens=int(state.position[0]),
        passages=_passages(language_model, reply),
    )


@torch.inference_mode()
def reply_to(language_model: LanguageModel, state: StreamState, question: str) -> Reply:
    """Answer `question` greedily.

    The confidence is the probability that there is an answer at all (the first token is not
    <|unknown|>), times the geometric mean of the answer's token probabilities if there is one,
    <|stop|> included.

    Raises:
        Refused: the question is empty, or longer than the window.
    """
    model, tokenizer, _, threshold = language_model
    ids = encode_question(tokenizer, question)
    window = model.window_of(state)
    if len(ids) > window:
        raise Refused(
            f"the question has {len(ids):,} tokens, the window holds {window:,}",
            "",
            "ask in fewer words, or open the session with a larger window=",
        )
    if not question.strip():
        raise Refused("the question is empty")
    device = state.position.device
    one = torch.ones(1, 1, device=device)

    def read(
        token: int, state: StreamState, ready: Ready | None = None
    ) -> tuple[Tensor, StreamState, Ready | None]:
        tokens = torch.tensor([[token]], device=device)
        logits, state, stats = model(tokens, state, read_weight=one, ready=ready)
        return logits[0, -1].double().nan_to_num().log_softmax(-1), state, stats.ready

    _, state, _ = model(torch.tensor([ids[:-1]], device=device), state, head=False)
    log_p, state, ready = read(ids[-1], _without_mass(state))  # what the question read is no reason
    is_answer = 1.0 - float(log_p[UNKNOWN].exp())
    if is_answer < LEAST_PROBABILITY:
        return Reply("", is_answer, False, state, queries=1)
    log_p = log_p - math.log(is_answer)  # given that there is an answer
    answer: list[int] = []
    log_probabilities: list[float] = []
    while True:
        answer.append(_likeliest(log_p, first=not answer))
        log_probabilities.append(float(log_p[answer[-1]]))
        if answer[-1] == STOP or len(answer) == MAX_ANSWER:
            break
        log_p, state, ready = read(answer[-1], state, ready)
    text = decode_answer(tokenizer, answer)
    confidence = is_answer * math.exp(sum(log_probabilities) / len(log_probabilities))
    known = text != "" and confidence >= threshold
    return Reply(text, confidence, known, state, queries=len(answer))


def _likeliest(log_p: Tensor, first: bool) -> int:
    """The likeliest token of an answer: text, or <|stop|> behind it."""
    legal = log_p.clone()
    legal[:NUM_SPECIAL] = -torch.inf
    if not first:
        legal[STOP] = log_p[STOP]
    return int(legal.argmax())


def _without_mass(state: StreamState) -> StreamState:
    """A state whose stored pairs have not been read yet."""
    blocks = [
        block
        if block.store is None
        else block._replace(store=block.store._replace(mass=torch.zeros_like(block.store.mass)))
        for block in state.blocks
    ]
    return state._replace(blocks=tuple(blocks))


def _passages(language_model: LanguageModel, reply: Reply) -> list[dict[str, Any]]:
    """What was read most while answering: pairs whose spans overlap are one passage.

    mass: share of the attention of all heads with a store, summed over the passage's pairs.
    """
    stores = [block.store for block in reply.state.blocks if block.store is not None]
    pairs = []
    for store in stores:
        heads = store.mass.shape[1] * len(stores) * reply.queries
        mass = store.mass[0].flatten()
        best = mass.topk(min(MAX_PAIRS, mass.numel())).indices
        rows = (t[0].flatten(0, 1)[best].tolist() for t in (store.position, store.span))
        for share, position, span in zip(mass[best].tolist(), *rows, strict=True):
            if share > 0 and position >= 0:
                pairs.append((position, share / heads, span))
    pairs = sorted(pairs, key=lambda pair: -pair[1])[:MAX_PAIRS]
    groups: list[list[tuple]] = []
    for pair in sorted(pairs, key=lambda pair: pair[0]):
        if groups and pair[0] - groups[-1][0][0] < SPAN:
            groups[-1].append(pair)
        else:
            groups.append([pair])
    found = [_passage(language_model, group) for group in groups]
    return sorted(found, key=lambda passage: -passage["mass"])[:MAX_PASSAGES]


def _passage(language_model: LanguageModel, pairs: list[tuple]) -> dict[str, Any]:
    """The text around some pairs (position, mass, span) that lie close together."""
    before = SPAN - SPAN_AFTER - 1  # ids of a span that precede the pair's own token
    ids = {}
    for position, _, span in pairs:
        ids |= {position - before + i: token for i, token in enumerate(span) if token >= 0}
    text = [ids[place] for place in sorted(ids) if ids[place] >= NUM_SPECIAL]
    return {
        "position": max(pairs, key=lambda pair: pair[1])[0],
        "text": language_model.tokenizer.decode(text),
        "mass": sum(mass for _, mass, _ in pairs),
    }
