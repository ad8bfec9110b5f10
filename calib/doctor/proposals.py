"""What the detector's proposals say: how many objects they cover, and how ``bbox`` is meant.

A head scores proposals. An object that none covers is found by no head, and a box that is no object's in the pixels of
its picture is covered by few. So the format of boxes shows: read as it is meant, proposals cover far more of them.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np

from calib.annotations import Integers
from calib.doctor.agreement import SURE, z_over_pictures
from calib.doctor.boxes import AS_IS, Format, edit
from calib.doctor.findings import Finding, share
from calib.doctor.sample import IOU, Answers, Evidence
from calib.evaluate import bin_index

MORE = 0.2  # of all objects: by so much another reading must cover more
LEAST_COVERED = 0.4  # by a reading that is reported
FEW, ALMOST_NONE = 0.5, 0.2
ENOUGH = 10, 50  # objects for a statement on a bin, and on all


def format_of_proposals(evidence: Evidence, formats: Iterable[Format], plain: Format = AS_IS) -> Format:
    """The reading of ``bbox`` under which proposals cover far more objects than under ``plain``, which is it in doubt.

    Far more: by ``MORE`` of all objects, and by ``SURE`` standard errors over pictures.
    """
    own = evidence.answers[plain.meaning].is_covered
    best, most = plain, own.mean() + MORE if len(own) else 1.0
    for form in formats:
        covered = evidence.answers[form.meaning].is_covered
        gain = covered.astype(np.float64) - own
        if form is plain or not len(own) or covered.mean() < max(most, LEAST_COVERED):
            continue
        if z_over_pictures(evidence.image, gain) > SURE:
            best, most = form, covered.mean()
    return best


def format_found(where: str, evidence: Evidence, form: Format) -> Finding:
    """``form`` is what proposals tell."""
    n = len(evidence.image)
    own, other = (int(evidence.answers[m].is_covered.sum()) for m in (AS_IS.meaning, form.meaning))
    text = f"bbox holds {form.meaning}: so read, the detector's proposals cover {share(other, n)} objects; read as "
    text += f"x, y, width, height {share(own, n)}"
    details = {"objects": n, "covered": other, "covered_as_is": own, "meaning": form.meaning}
    return Finding(form.code, "error", where, text, edit(form), (), details)


def recall(evidence: Evidence, answers: Answers, counts: Integers, bins: tuple[int, ...]) -> dict[str, Any]:
    """The share of objects that a proposal covers with IoU >= 0.5: of all, and per bin of training instances the mean
    over categories; -1 where there are none."""
    covered, c = answers.is_covered, len(counts)
    n = np.bincount(evidence.category, minlength=c)
    found = np.bincount(evidence.category, weights=covered.astype(np.float64), minlength=c)
    index = bin_index(counts, bins)
    groups = [(n > 0) & (index == b) for b in range(len(bins) + 1)]
    return {
        "images": evidence.images,
        "objects": len(covered),
        "covered": int(covered.sum()),
        "recall": float(covered.mean()) if len(covered) else -1.0,
        "objects_per_bin": [int(n[g].sum()) for g in groups],
        "covered_per_bin": [int(found[g].sum()) for g in groups],
        "recall_per_bin": [float((found[g] / n[g]).mean()) if g.any() else -1.0 for g in groups],
    }


def check_recall(
    where: str, details: dict[str, Any], bins: tuple[int, ...], *, seen_in_training: bool
) -> list[Finding]:
    """What proposals leave for a head to do."""
    if not details["objects"]:
        return []
    text = f"proposals cover (IoU >= {IOU}) {share(details['covered'], details['objects'])} objects on "
    text += f"{details['images']} pictures; mean of categories by training instances: "
    text += per_bin(details["recall_per_bin"], bins)
    if seen_in_training:
        text += "; these are pictures of TRAIN, on others it may be less (--val)"
    rare, n = details["recall_per_bin"][0], details["objects_per_bin"][0]
    numbers = {k: details[k] for k in ("objects", "covered", "recall", "recall_per_bin", "objects_per_bin")}
    if details["objects"] >= ENOUGH[1] and details["recall"] < ALMOST_NONE:
        text += ": hardly any object is found"
        remedy = (
            "are boxes in pixels of these pictures, and are these the detector's weights and its kind of pictures? "
        )
        remedy += "An object without a proposal is found by no head"
        return [Finding("proposals-miss", "error", where, text, remedy, (), numbers)]
    if n >= ENOUGH[0] and rare < FEW:
        text += (
            f": of rare objects {100 * (1 - rare):.0f} % have no proposal. No head finds them: with right labels for "
        )
        text += "all proposals they would still be missed"
        remedy = (
            "more proposals at test time (post_nms_top_n, POST_NMS_TOPK_TEST, max_per_img; of one stage a "
            "lower conf or score_thresh), lower NMS in the RPN, or "
        )
        remedy += "a detector whose proposals cover them (trained longer, or class-agnostic on more data)"
        return [Finding("proposals-miss-rare", "warning", where, text, remedy, (), numbers)]
    text += ": what they cover is the most that a head can find"
    return [Finding("proposals", "note", where, text, "", (), numbers)]


def per_bin(values: list[float], bins: tuple[int, ...]) -> str:
    """``below 10: 98.0 %, 10 to 99: ...``; bins without categories are left out."""
    edges = [f"below {bins[0]}", *(f"{a} to {b - 1}" for a, b in pairwise(bins)), f"from {bins[-1]}"]
    return ", ".join(f"{e}: {100 * v:.1f} %" for e, v in zip(edges, values, strict=True) if v >= 0)
