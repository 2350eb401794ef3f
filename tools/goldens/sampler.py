"""Makes test/goldens/sampler.json: next-token distributions by HF transformers' logits processors.

Run: python tools/goldens/sampler.py (needs numpy, torch, transformers 5). Everything is computed in
float64 over float32 logits, so that no boundary of a filter hangs on rounding. Biases and the
presence and frequency penalties, which transformers lacks, are written out by their definitions.
"""

import base64
import json
import pathlib

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

VOCAB = 256
NEUTRAL = dict(
    temperature=1.0,
    topK=0,
    topP=1.0,
    minP=0.0,
    typicalP=1.0,
    repetitionPenalty=1.0,
    presencePenalty=0.0,
    frequencyPenalty=0.0,
    logitBias=[],
)
CASES = [
    {},
    dict(temperature=0.3),
    dict(temperature=2.5),
    dict(topK=1),
    dict(topK=40),
    dict(topK=255),
    dict(topK=1000),
    dict(topP=0.1),
    dict(topP=0.5),
    dict(topP=0.95),
    dict(topP=0.999),
    dict(topP=0.0),
    dict(topP=0.9, temperature=2.0),
    dict(minP=0.05),
    dict(minP=0.9),
    dict(minP=1.0),
    dict(typicalP=0.2),
    dict(typicalP=0.95),
    dict(typicalP=0.5, temperature=1.7),
    dict(topK=40, topP=0.9),
    dict(topK=40, topP=0.9, minP=0.02),
    dict(topP=0.98, minP=0.01, temperature=1.5),
    dict(topK=60, topP=0.97, minP=0.01, typicalP=0.8, temperature=1.3),
    dict(topP=0.95, typicalP=0.6),
    dict(repetitionPenalty=1.3),
    dict(repetitionPenalty=0.8, topK=20),
    dict(presencePenalty=0.7),
    dict(frequencyPenalty=0.4),
    dict(presencePenalty=-0.5, frequencyPenalty=-0.3, topP=0.9),
    dict(logitBias=[[3, 5.0], [100, -100.0], [255, 2.5]]),
    dict(
        logitBias=[[1, 4.0], [2, -3.0], [7, 1.0]],
        repetitionPenalty=1.2,
        presencePenalty=0.3,
        frequencyPenalty=0.2,
        temperature=0.8,
        topK=50,
        topP=0.95,
        minP=0.02,
        typicalP=0.9,
    ),
]


def logits_of(rng, kind):
    if kind == "peaked":
        row = rng.normal(0, 2.5, VOCAB)
        row[rng.integers(0, VOCAB, 6)] += rng.uniform(4, 9, 6)
    elif kind == "flat":
        row = rng.normal(-3, 0.3, VOCAB)
    else:  # few distinct values, so that ties fall on every boundary, and a few impossible tokens
        row = np.round(rng.normal(1, 1.5, VOCAB) * 2) / 2
        row[rng.integers(0, VOCAB, 10)] = -np.inf
    return row.astype(np.float32)


def distribution(row, prompt, output, p):
    scores = torch.tensor(row, dtype=torch.float64)[None, :]
    for token, bias in p["logitBias"]:
        scores[0, token] += bias
    if p["repetitionPenalty"] != 1:
        ids = torch.tensor([prompt + output])
        scores = RepetitionPenaltyLogitsProcessor(p["repetitionPenalty"])(ids, scores)
    for token in set(output):
        count = output.count(token)
        scores[0, token] -= p["presencePenalty"] + p["frequencyPenalty"] * count
    warpers = LogitsProcessorList([TemperatureLogitsWarper(p["temperature"])])
    if p["topK"] > 0:
        warpers.append(TopKLogitsWarper(p["topK"]))
    if p["topP"] < 1:
        warpers.append(TopPLogitsWarper(p["topP"]))
    if p["minP"] > 0:
        warpers.append(MinPLogitsWarper(p["minP"]))
    if p["typicalP"] < 1:
        warpers.append(TypicalLogitsWarper(p["typicalP"]))
    scores = warpers(None, scores)
    return torch.softmax(scores, dim=-1)[0].numpy()


def main():
    rng = np.random.default_rng(20240607)
    cases = []
    for kind in ["peaked", "flat", "ties"]:
        for changes in CASES:
            row = logits_of(rng, kind)
            prompt = rng.integers(0, VOCAB, 12).tolist()
            output = rng.integers(0, VOCAB, 8).tolist()
            output += output[:3] + [1]
            params = {**NEUTRAL, **changes}
            probabilities = distribution(row, prompt, output, params)
            kept = np.nonzero(probabilities > 0)[0]
            cases.append(
                dict(
                    kind=kind,
                    params=params,
                    prompt=prompt,
                    output=output,
                    logits=base64.b64encode(row.tobytes()).decode(),
                    kept=base64.b64encode(kept.astype("<u2").tobytes()).decode(),
                    probabilities=base64.b64encode(
                        probabilities[kept].astype("<f4").tobytes()
                    ).decode(),
                )
            )
    path = pathlib.Path(__file__).parents[2] / "test" / "goldens" / "sampler.json"
    path.write_text(json.dumps(dict(vocab=VOCAB, cases=cases), indent=1) + "\n")
    print(path, path.stat().st_size, "bytes", len(cases), "cases")


main()
