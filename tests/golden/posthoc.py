"""norcal*, logn_*, fracal*, iif*, lws*, ncm_*, cosine_classifier*: what transforms a given classifier."""

import numpy as np
import torch
from torch import Tensor

from calib.heads.affine import AffineHead
from calib.heads.linear import LinearClassifier
from calib.heads.ncm import NCMHead, distances, transformed
from calib.heads.sigmoid_product import SigmoidProductHead
from calib.losses.margin import FREQUENCY_FORMS, inverse_frequency
from calib.losses.softmax import cross_entropy
from calib.methods import fracal, logn
from calib.methods.lws import Scales
from calib.methods.ncm import centroids
from calib.methods.norcal import NorCal, image_factors
from calib.settings import Loop
from calib.training.optimizer import Updater

from .case import Case


def _affine(logits: Tensor, renormalise: str = "none") -> AffineHead:
    return AffineHead(LinearClassifier(torch.zeros(logits.shape[1], 2)), renormalise=renormalise)


def check_norcal(case: Case) -> None:
    """p_{form}_g{tenths}_{renorm|raw}; cb0999: effective number with 0.999."""
    logits, counts = case["logits"], case["image_counts"]
    for key in list(case.keys("p_")):
        form, *rest = key.removeprefix("p_").split("_")
        if form.startswith("cb"):
            by, gamma, form = "effective", float(f"{form[2]}.{form[3:]}"), rest[0]
        else:
            by, gamma = "power", float(rest[0][1:]) / 10 ** (len(rest[0]) - 2)
        if form == "exps" and rest[-1] == "raw":
            # e^z times the factors, no scores: what is compared is the factors.
            factors = case[key].double() / logits.double().exp()
            wanted = torch.cat([image_factors(counts, gamma, by), torch.ones(1)])
            torch.testing.assert_close(factors, wanted.expand_as(factors), rtol=1e-5, atol=1e-5)
            continue
        renormalise = rest[-1] == "renorm"
        head = NorCal(gamma, by, form, renormalise).apply(_affine(logits, "all" if renormalise else "none"), counts)
        case.check(key, head.correct(logits))
    case.ignore("y")


def check_logn(case: Case) -> None:
    logits, running = case["logits"], logn.Running(case.hyper["momentum"], case["logits"].shape[1])
    for rows in case["batch_index"]:
        running.add(logits[rows])
    mean, variance = running.result()
    case.check("running_mean", mean)
    case.check("running_var", variance)
    head = logn.normalised(_affine(logits), mean, variance)
    case.check("calibrated_logits", head.scale * logits + head.shift)
    case.check("probs", head.correct(logits))
    # What their eval mode prepares on the way: background mean 0, deviation 1, shift 0.
    mean[-1] = 0
    case.check("running_mean_after_eval", mean)
    case.check("std_used", 1 / head.scale[None])
    case.check("mean_used", mean[None])
    case.check("beta_used", mean.min().expand(len(mean)).where(torch.arange(len(mean)) < len(mean) - 1, 0.0)[None])


FORMS = {"base10": "log10", "base2": "log2", "raw": "ln", "prob": "logit"}


def check_fracal(case: Case) -> None:
    if "category" in case:
        _dimension(case)
    elif "scores" in case:
        share = case["img_freq"].double() / case.hyper["num_images"]
        case.check("image_freq_fraction", share)
        method = fracal.Fracal(case.hyper["fractal_l"], FORMS[case.hyper["variant"]])
        head = method.apply(_affine(case["logits"], "all"), share, case["fractal_dim"])
        case.check("shift", head.shift[None])
        case.check("scores", head.correct(case["logits"]))
        case.ignore("instance_freq")
    else:
        for key in list(case.keys("scores_")):
            _variant(case, key.removeprefix("scores_"))


def _variant(case: Case, name: str) -> None:
    """{form}[_obj]_l{lambda}_{softmax|sigmoid}."""
    form, *rest = name.split("_")
    share = case["doc_freq"].double() / case["num_images"].double()
    if "obj" in rest:
        share = case["instance_freq"].double() / case["instance_freq"].sum()
    strength, dimension = float(rest[-2][1:]), case["fractal_dim"]
    if rest[-1] == "sigmoid":
        c = len(dimension)
        shift = fracal.sigmoid_shift(share, dimension, strength, FORMS[form]).float()
        head = SigmoidProductHead(LinearClassifier(torch.zeros(c, 2)), shift)
        case.check(f"shift_{name}", fracal.frequency_shift(share, FORMS[form]))
        case.check(f"scores_{name}", head.full_scores(torch.zeros(0), case["logits"][:, :c])[:, :-1])
        return
    head = fracal.Fracal(strength, FORMS[form]).apply(_affine(case["logits"], "all"), share, dimension)
    case.check(f"shift_{name}", head.shift)
    case.check(f"scores_{name}", head.correct(case["logits"]))


def _dimension(case: Case) -> None:
    x = (case["xmin"] + case["width"] / 2).numpy()
    y = (case["ymin"] + case["height"] / 2).numpy()
    label = case["category"].numpy() - 1
    found = fracal.fractal_dimension(label, x, y, case.hyper["num_classes"], case.hyper["max_grid"])
    case.check("fractal_dim", torch.from_numpy(found))


def check_iif(case: Case) -> None:
    """Published weights of all forms, or those of the form ``variant`` in the loss and the scores."""
    h, img, inst = case.hyper, case["img_freq"], case["instance_freq"]
    if "logits" not in case:
        for form in FREQUENCY_FORMS:
            case.check(f"weight_{form}", inverse_frequency(img, h["num_images"], form))
            case.check(f"weight_{form}_obj", inverse_frequency(inst, int(inst.sum()), form))
        return
    form, _, instances = h["variant"].partition("_")
    counts, total = (inst, h["num_instances"]) if instances else (img, h["num_images"])
    head, z, y = (
        _affine(case["logits"]).set(scale=inverse_frequency(counts, total, form)),
        case.leaf("logits"),
        case["labels"],
    )
    case.check("weights", head.scale)
    loss = cross_entropy(head.scale * z, y).mean()
    loss.backward()
    case.check("loss", loss)
    case.check("grad_logits", z.grad)
    case.check("scores", head.correct(case["logits"]))


def check_lws(case: Case) -> None:
    h, classifier = case.hyper, LinearClassifier(case["W"], case["b"]).requires_grad_(False)
    scales = Scales(len(case["W"]))
    with torch.no_grad():
        scales.factor.copy_(case["scales"])
    z = scales(classifier(case["X"]))
    loss = cross_entropy(z, case["y"]).mean()
    loss.backward()
    case.check("logits", z)
    case.check("loss", loss)
    case.check("d_scales", scales.factor.grad)
    scales = Scales(len(case["W"]))
    scales.factor.data.fill_(h["scale_init"])
    updater, losses = Updater(scales, Loop(momentum=h["momentum"], weight_decay=h["weight_decay"])), []
    for rows in case["batch_index"]:
        loss = cross_entropy(scales(classifier(case["X"][rows])), case["y"][rows]).mean()
        losses.append(float(loss.detach()))
        updater.update(loss, h["lr"])
    case.check("losses", torch.tensor(losses))
    final = next(case.keys("scales_after"))
    assert final == f"scales_after{len(losses)}"
    case.check(final, scales.factor)


def check_ncm(case: Case) -> None:
    if "centers" in case:
        for key, source in (("scores_fc", "pre_relu"), ("scores_conv", "X")):
            x, centres = case[source], case["centers"][1:]
            head = NCMHead(LinearClassifier(torch.zeros(len(centres) + 1, x.shape[1])), "un", "unit", 1.0)
            head.temperature = case.hyper["temperature"]
            head.set(torch.zeros(x.shape[1]), centres, torch.ones(len(centres), dtype=torch.bool))
            case.check(key, head.full_scores(x, case.background_last("logits")).roll(1, 1))
        return
    case.check("mean", case["X"].mean(dim=0))
    labels = torch.from_numpy(np.searchsorted(case["classes"].numpy(), case["y"].numpy()))
    for transform, key in (("un", "uncs"), ("l2n", "l2ncs"), ("cl2n", "cl2ncs")):
        centroid, _ = centroids(transformed(case["X"], case["mean"], transform), labels, len(case["classes"]))
        case.check(key, centroid)
        query = transformed(case["Q"], case["mean"], transform)
        for distance in ("l2", "cos"):
            case.check(f"logits_{transform}_{distance}", distances(query, centroid, distance))


def check_cosine(case: Case) -> None:
    if "W" in case:
        for prefix, form, bias in (("logits_cosnorm", "squashed", None), ("logits_mmdet_normed", "normed", case["b"])):
            (key,) = case.keys(prefix)
            scale = torch.tensor([float(key.removeprefix(prefix))])
            case.check(key, LinearClassifier(case["W"], bias, scale, form)(case["X"]))
        return
    plain = LinearClassifier(case["weight"], None, torch.tensor([1.0]), "cosine")
    case.check("cos_logits_ldam", plain(case["X"]))
    tau = torch.tensor([float(case.hyper["tau_mmdet"])])
    normed = LinearClassifier(case["weight"], case["bias"], tau, "normed")
    key = next(case.keys("logits_mmdet"))
    case.check(key, normed(case["X"]))
    case.check("scores_mmdet", case[key].softmax(dim=1))
