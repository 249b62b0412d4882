"""Triton kernels of labels: loss and gradient in one launch, what the statistics take in in one or two, the gate."""

from __future__ import annotations

import triton
import triton.language as tl

from sfr.labels import cross_entropy, early_learning

# What targets are smoothed towards; outside of the kernels the value of these, as Triton 3.2 takes nothing else.
UNIFORM, CLASS_MEANS, PAST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
IMPOSSIBLE = tl.constexpr(cross_entropy.IMPOSSIBLE)
LEAST = tl.constexpr(early_learning.LEAST)
TINY = tl.constexpr(1.1754944e-38)  # the smallest normal float32
LABELS = tl.constexpr(128)  # labels or numbers of samples that are read at a time


@triton.jit
def loss_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, of_row, of_class, target_ptr, numbers_ptr, towards_ptr, count_ptr, loss_ptr, gradient_ptr, sides_ptr,
    correct_ptr, rows, classes, samples, alpha, left_to_labels, ignore_index, SOURCE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss of one row, its share of the mean over `count` of them, and the gradient of that with respect to the logits.

    Beside it are kept the largest logit of the row, the logarithm of the sum of the exponentials above it, and the sum
    of its target over `count`: three numbers a row; and for the class means the label, -1 where it was not predicted.
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    logits_row = logits_ptr + row * of_row
    label = tl.load(target_ptr + row).to(tl.int64)
    kept = label != ignore_index
    # A label or number out of range makes the loss NaN, in the place of a read from anywhere.
    sound = (label >= 0) & (label < classes)
    place = label * classes
    if SOURCE == PAST:
        number = tl.load(numbers_ptr + row).to(tl.int64)
        sound = sound & (number >= 0) & (number < samples)
        place = number * classes
    place = tl.where(sound, place, 0)
    towards_row = towards_ptr + place

    peak = largest(logits_row, of_class, classes, c)

    exponentials, said = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    predicted = tl.full((BLOCK,), 2147483647, tl.int32)
    done = classes * 0
    while done < classes:
        inside = done + c < classes
        x = tl.load(logits_row + (done + c) * of_class, mask=inside, other=float("-inf")).to(tl.float32)
        exponentials += tl.where(inside, tl.exp(x - peak), 0.0)
        predicted = tl.minimum(predicted, tl.where(inside & (x == peak), done + c, 2147483647))
        if SOURCE == PAST:
            said += tl.load(towards_row + done + c, mask=inside, other=0.0).to(tl.float32)
        done += BLOCK
    log_sum, of_said = tl.log(tl.sum(exponentials, axis=0)), tl.sum(said, axis=0)

    possible, forbidden = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.int32)
    done = classes * 0
    while done < classes:
        inside = done + c < classes
        x = tl.load(logits_row + (done + c) * of_class, mask=inside, other=0.0).to(tl.float32)
        impossible = inside & (x - peak - log_sum <= IMPOSSIBLE)
        forbidden += impossible.to(tl.int32)
        possible += tl.where(impossible, 0.0, distribution(towards_row, label, done + c, classes, of_said, SOURCE))
        done += BLOCK
    masked = tl.sum(forbidden, axis=0) > 0
    of_possible = tl.sum(possible, axis=0)
    scale = tl.where(masked, tl.maximum(of_possible, TINY), 1.0)
    whole = left_to_labels + alpha * (of_possible / scale)

    count = tl.load(count_ptr).to(tl.float32)
    losses = tl.zeros((BLOCK,), tl.float32)
    done = classes * 0
    while done < classes:
        inside = done + c < classes
        x = tl.load(logits_row + (done + c) * of_class, mask=inside, other=0.0).to(tl.float32)
        logarithm = x - peak - log_sum
        towards = distribution(towards_row, label, done + c, classes, of_said, SOURCE)
        towards = tl.where(masked & (logarithm <= IMPOSSIBLE), 0.0, towards) / scale
        target = alpha * towards + tl.where(done + c == label, left_to_labels, 0.0)
        losses += tl.where(inside & (target != 0.0), target * logarithm, 0.0)
        gradient = tl.where(kept, (whole * tl.exp(logarithm) - target) / count, 0.0)
        tl.store(gradient_ptr + row * classes + done + c, gradient, mask=inside)
        done += BLOCK
    loss = tl.where(sound, -tl.sum(losses, axis=0), float("nan"))
    tl.store(loss_ptr + row, tl.where(kept, loss, 0.0) / count)
    tl.store(sides_ptr + row, peak)
    tl.store(sides_ptr + rows + row, log_sum)
    tl.store(sides_ptr + 2 * rows + row, tl.where(kept, whole, 0.0) / count)
    if SOURCE == CLASS_MEANS:
        is_correct = sound & kept & (tl.min(predicted, axis=0) == label) & (log_sum == log_sum)
        tl.store(correct_ptr + row, tl.where(is_correct, label, -1).to(tl.int32))


@triton.jit
def largest(logits_row, of_class, classes, c):  # type: ignore[no-untyped-def]
    """Return the largest logit of a row."""
    found = tl.full(c.shape, float("-inf"), tl.float32)
    done = classes * 0
    while done < classes:
        x = tl.load(logits_row + (done + c) * of_class, mask=done + c < classes, other=float("-inf")).to(tl.float32)
        found = tl.maximum(found, x)
        done += c.shape[0]
    return tl.max(found, axis=0)


@triton.jit
def distribution(towards_row, label, c, classes, of_said, SOURCE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return what a row is smoothed towards, at the classes `c`; zero outside.

    The weights of what was said of a sample sum to `of_said`; of one of which nothing was, it is the label.
    """
    inside = c < classes
    if SOURCE == UNIFORM:
        found = tl.where(inside, 1.0 / classes, 0.0)
    else:
        found = tl.load(towards_row + c, mask=inside, other=0.0).to(tl.float32)
        if SOURCE == PAST:
            nothing = tl.where(c == label, 1.0, 0.0)
            found = tl.where(of_said > 0.0, found / of_said, nothing)
    return found


@triton.jit
def keep_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, of_row, of_class, numbers_ptr, sides_ptr, table_ptr, rows, classes, samples, momentum,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Move what was said of one sample, float16, towards its softmax, unless the sample comes again in a later row."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.load(numbers_ptr + row).to(tl.int64)
    again = tl.zeros((LABELS,), tl.int32)
    done = rows * 0
    while done < rows:
        other = done + tl.arange(0, LABELS)
        found = tl.load(numbers_ptr + other, mask=other < rows, other=-1).to(tl.int64)
        again += ((found == number) & (other > row) & (other < rows)).to(tl.int32)
        done += LABELS
    peak, log_sum = tl.load(sides_ptr + row), tl.load(sides_ptr + rows + row)
    finite = log_sum == log_sum
    if (number >= 0) & (number < samples) & (tl.sum(again, axis=0) == 0) & finite:
        done = classes * 0
        while done < classes:
            c = done + tl.arange(0, BLOCK)
            inside = c < classes
            x = tl.load(logits_ptr + row * of_row + c * of_class, mask=inside, other=0.0).to(tl.float32)
            said = tl.exp(x - peak - log_sum).to(tl.float16).to(tl.float32)
            place = table_ptr + number * classes + c
            before = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            tl.store(place, between(before, said, momentum).to(tl.float16), mask=inside)
            done += BLOCK


@triton.jit
def early_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, of_row, of_class, target_ptr, numbers_ptr, sides_ptr, table_ptr, means_ptr, count_ptr, loss_ptr,
    gradient_ptr, classes, samples, weight, ignore_index, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add weight * log(1 - <t, p>) of one row to its loss and gradient, and keep t, as `keep_kernel` has left it."""
    row = tl.program_id(0).to(tl.int64)
    label, number = tl.load(target_ptr + row).to(tl.int64), tl.load(numbers_ptr + row).to(tl.int64)
    sound = (number >= 0) & (number < samples)
    table_row = table_ptr + tl.where(sound, number, 0) * classes
    peak, log_sum = tl.load(sides_ptr + row), tl.load(sides_ptr + tl.num_programs(0).to(tl.int64) + row)
    share = tl.where(label != ignore_index, weight / tl.load(count_ptr).to(tl.float32), 0.0)
    c = tl.arange(0, BLOCK)
    logits_row, place = logits_ptr + row * of_row, row * classes

    agreeing = tl.zeros((BLOCK,), tl.float32)
    done = classes * 0
    while done < classes:
        inside = done + c < classes
        x = tl.load(logits_row + (done + c) * of_class, mask=inside, other=float("-inf")).to(tl.float32)
        mean = tl.load(table_row + done + c, mask=inside, other=0.0).to(tl.float32)
        agreeing += tl.where(inside, mean * tl.exp(x - peak - log_sum), 0.0)
        tl.store(means_ptr + place + done + c, mean, mask=inside)
        done += BLOCK
    agreement = tl.sum(agreeing, axis=0)
    rest = 1.0 - agreement
    bounded = tl.where(rest < LEAST, LEAST, rest)  # NaN stays NaN
    added = tl.where(share == 0.0, 0.0, share * tl.log(bounded))
    tl.store(loss_ptr + row, tl.load(loss_ptr + row) + added)

    slope = tl.where(rest < LEAST, 0.0, -share / bounded)
    done = classes * 0
    while done < classes:
        inside = done + c < classes
        x = tl.load(logits_row + (done + c) * of_class, mask=inside, other=float("-inf")).to(tl.float32)
        mean = tl.load(table_row + done + c, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(gradient_ptr + place + done + c, mask=inside, other=0.0)
        change = tl.where(share == 0.0, 0.0, slope * tl.exp(x - peak - log_sum) * (mean - agreement))
        tl.store(gradient_ptr + place + done + c, gradient + change, mask=inside)
        done += BLOCK


@triton.jit
def class_sums_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, of_row, of_class, correct_ptr, sides_ptr, sums_ptr, rows, classes, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of the softmax over the rows that are correctly of one class, and their number behind it: K + 1 numbers."""
    own = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    inside = c < classes
    sums, count = tl.zeros((BLOCK,), tl.float32), tl.program_id(0) * 0
    done = rows * 0
    while done < rows:
        several = done + tl.arange(0, LABELS)
        labels = tl.load(correct_ptr + several, mask=several < rows, other=-1)
        if tl.sum((labels == own).to(tl.int32), axis=0) > 0:
            row = done
            while row < tl.minimum(done + LABELS, rows):
                if tl.load(correct_ptr + row) == own:
                    peak, log_sum = tl.load(sides_ptr + row), tl.load(sides_ptr + rows + row)
                    place = logits_ptr + row.to(tl.int64) * of_row + c * of_class
                    x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
                    sums += tl.exp(x - peak - log_sum)
                    count += 1
                row += 1
        done += LABELS
    place = sums_ptr + own * (classes + 1)
    tl.store(place + c, sums, mask=inside)
    tl.store(place + classes, count.to(tl.float32))


@triton.jit
def move_kernel(  # type: ignore[no-untyped-def]
    sums_ptr, distributions_ptr, counts_ptr, classes, log_rest, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move the distribution of one class towards the mean of its new samples, as ClassMeans does.

    `log_rest` is the logarithm of what one sample leaves of the mean before it.
    """
    own = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    inside = c < classes
    place = sums_ptr + own * (classes + 1)
    count = tl.load(place + classes)
    total = tl.load(counts_ptr + own) + count
    share = tl.maximum(1.0 - tl.exp(count * log_rest), count / tl.maximum(total, 1.0))
    share = tl.where(count > 0.0, share, 0.0)
    mean = tl.load(place + c, mask=inside, other=0.0) / tl.maximum(count, 1.0)
    before = tl.load(distributions_ptr + own * classes + c, mask=inside, other=0.0)
    tl.store(distributions_ptr + own * classes + c, between(before, mean, share), mask=inside)
    tl.store(counts_ptr + own, total)


@triton.jit
def fitted_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, of_row, of_class, target_ptr, fitted_ptr, classes, ignore_index, BLOCK: tl.constexpr,
):  # fmt: skip
    """Square of the probability that one row gives to its label; 1 if that is ignored, 0 if it is no number."""
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * of_row
    label = tl.load(target_ptr + row).to(tl.int64)
    c = tl.arange(0, BLOCK)
    peak = largest(logits_row, of_class, classes, c)
    exponentials, of_label = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    done = classes * 0
    while done < classes:
        inside = done + c < classes
        x = tl.load(logits_row + (done + c) * of_class, mask=inside, other=float("-inf")).to(tl.float32)
        exponential = tl.where(inside, tl.exp(x - peak), 0.0)
        exponentials += exponential
        of_label += tl.where(done + c == label, exponential, 0.0)
        done += BLOCK
    probability = tl.sum(of_label, axis=0) / tl.sum(exponentials, axis=0)
    found = tl.where(probability == probability, probability * probability, 0.0)
    tl.store(fitted_ptr + row, tl.where(label == ignore_index, 1.0, found))


@triton.jit
def between(start, end, share):  # type: ignore[no-untyped-def]
    """Return what lies between two tiles, as Tensor.lerp does: the end itself where the share is 1."""
    return tl.where(share < 0.5, start + share * (end - start), end - (end - start) * (1.0 - share))
