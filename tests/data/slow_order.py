"""Megatron's order by its written rules, one value after the other, to hold the fast one against.

Shares nothing with the code under test but the legacy generator, used on lists.
"""

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass
class SlowFile:
    documents: list = field(default_factory=list)
    samples: list = field(default_factory=list)  # rows of the sample index
    shuffle: list = field(default_factory=list)
    epochs: int = 0


def plain_sum(values):
    total = 0.0
    for value in values:
        total = total + value
    return total


def pairwise_sum(values):
    """How numpy adds float64: 8 running sums up to 128 values, halves above."""
    n = len(values)
    if n < 8:
        return plain_sum(values)
    if n > 128:
        half = n // 2 - n // 2 % 8
        return pairwise_sum(values[:half]) + pairwise_sum(values[half:])
    r = list(values[:8])
    stop = n - n % 8
    for i in range(8, stop, 8):
        for j in range(8):
            r[j] += values[i + j]
    total = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]))
    for value in values[stop:]:
        total += value
    return total


def greedy(weights, size):
    counts = [0] * len(weights)
    picks = []
    for s in range(size):
        x = float(max(s, 1))
        best, best_error = 0, weights[0] * x - counts[0]
        for d in range(1, len(weights)):
            error = weights[d] * x - counts[d]
            if error > best_error:
                best, best_error = d, error
        picks.append((best, counts[best]))
        counts[best] += 1
    return picks


def boundaries(shares, documents):
    total = plain_sum(shares)
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + round(share / total * float(documents)))
    surplus = bounds[3] - documents
    return [0] + [bound - surplus for bound in bounds[1:]]


def slow_file(lengths, documents, request, seq, seed):
    """Index of one file in one split; None where it has no documents."""
    if not documents:
        return None
    per_epoch = sum(lengths[d] for d in documents)
    if per_epoch == 0:
        return SlowFile(samples=[(0, 0)])
    epochs = 1
    while (epochs * per_epoch - 1) // seq < request:
        epochs += 1
    total = (epochs * per_epoch - 1) // seq
    before, separate = 0, False
    if epochs > 1:
        before = ((epochs - 1) * per_epoch - 1) // seq
        separate = request - before < int(0.80 * ((per_epoch - 1) // seq))
    rng = np.random.RandomState(seed)
    order = list(documents) * (epochs - 1 if separate else epochs)
    rng.shuffle(order)
    if separate:
        last = list(documents)
        rng.shuffle(last)
        order += last
    rows, place, offset = [(0, 0)], 0, 0
    for _ in range(total):
        remaining = seq  # the token that ends a sample begins the next
        while lengths[order[place]] - offset <= remaining:
            remaining -= lengths[order[place]] - offset
            place, offset = place + 1, 0
        offset += remaining
        rows.append((place, offset))
    first = list(range(before if separate else total))
    rng.shuffle(first)
    rest = list(range(len(first), total))
    if separate:
        rng.shuffle(rest)
    return SlowFile(order, rows, first + rest, epochs)


def slow_tokens(file, sequences, number, seq):
    """Tokens of a sample: walk on from where it begins."""
    place, offset = file.samples[file.shuffle[number]]
    tokens = []
    while len(tokens) < seq + 1:
        tokens += sequences[file.documents[place]][offset : offset + seq + 1 - len(tokens)]
        place, offset = place + 1, 0
    return tokens


def slow_order(case, read):
    """Every sample of every split, in order.

    Args:
        case: `list` of (weight, prefix, corpus), `split`, `seed`, `seq_length`, `train_iters`,
            `global_batch_size`, `eval_interval`, `eval_iters`, `blend`, `shuffle`.
        read: prefix -> list of token lists.

    Returns:
        split name -> list of (corpus, file, row of the sample index, tokens).
    """
    seq, seed = case["seq_length"], case["seed"]
    batch = case["global_batch_size"]
    wanted = {
        "train": case["train_iters"] * batch,
        "valid": (case["train_iters"] // case["eval_interval"] + 1) * case["eval_iters"] * batch,
        "test": case["eval_iters"] * batch,
    }
    total_weight = plain_sum(weight for weight, _, _ in case["list"])
    requests = {
        name: [math.ceil(n * (weight / total_weight) * 1.005) for weight, _, _ in case["list"]]
        for name, n in wanted.items()
    }
    result = {}
    for part, name in enumerate(("train", "valid", "test")):
        if case["split"][part] == 0:
            continue
        files = []
        for (_, prefix, _), request in zip(case["list"], requests[name], strict=True):
            sequences = read(prefix)
            bounds = boundaries(case["split"], len(sequences))
            documents = list(range(bounds[part], bounds[part + 1]))
            files.append(slow_file([len(s) for s in sequences], documents, request, seq, seed))
        corpora = sorted({corpus for _, _, corpus in case["list"]})
        orders, sizes = [], []
        for corpus in corpora:
            members = [i for i, line in enumerate(case["list"]) if line[2] == corpus]
            asked = [requests[name][i] for i in members]
            size = sum(asked)
            if case["blend"] and size:
                # A file without samples is passed over; the others keep their shares.
                usable = [j for j, i in enumerate(members) if files[i] and files[i].shuffle]
                picks = greedy([asked[j] / size for j in usable], size)
                order = [(members[usable[j]], k) for j, k in picks]
            else:
                order = [(i, k) for i, n in zip(members, asked, strict=True) for k in range(n)]
            if case["shuffle"]:
                permutation = list(range(size))
                np.random.RandomState(seed).shuffle(permutation)
                order = [order[j] for j in permutation]
            orders.append(order)
            sizes.append(size)
        train_total = sum(requests["train"])
        weights = [size / train_total for size in sizes]
        norm = pairwise_sum(weights)
        usable = [c for c, size in enumerate(sizes) if size]
        picks = greedy([weights[c] / norm for c in usable], sum(sizes))
        samples = []
        for c, k in picks:
            i, number = orders[usable[c]][k]
            prefix = case["list"][i][1]
            tokens = slow_tokens(files[i], read(prefix), number, seq)
            row = files[i].shuffle[number]
            samples.append((corpora[usable[c]], prefix, row, tokens))
        result[name] = samples
    return result
