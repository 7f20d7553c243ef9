"""All figures of a report by name, from what `recount` counts."""

from itertools import pairwise

import numpy as np
import pandas as pd
from recount import CAUSES, CHORES, LANE, PARTS, SPENT

ROWS = (*SPENT, "open", "image")
STATES = ("queued", "running", "done", "cancelled", "failed")


def all_of(one, scenarios=(), usd=None):
    """The figures of a `Recount`, as the report nests them."""
    lanes = one.lane_time()
    seconds = {part: sum(lane["seconds"][part] for lane in lanes) for part in PARTS}
    curves = _curves(one)
    nfe = one.rows.groupby("spent").nfe.sum()
    kinds = {name: int(nfe.get(name, 0)) for name in (*SPENT, "open")}
    return {
        "span": {
            "seconds": one.wall, "lanes": one.lanes, "lane_seconds": one.wall * one.lanes, "batches": len(one.batches),
            "rows": len(one.rows),
        },
        "totals": _totals(one, kinds),
        "limit": _limit(seconds, scenarios),
        "stages": [{"name": n, "seconds": s, "share": _over(s, sum(seconds.values()))} for n, s in seconds.items()],
        "lanes": lanes,
        "beside": _beside(one),
        "kinds": [{"name": n, "nfe": v, "share": _over(v, sum(kinds.values()))} for n, v in kinds.items()],
        "timeline": _timeline(one),
        "levels": _levels(one),
        "methods": _methods(one),
        "curves": curves,
        "bands": _bands(curves),
        "buckets": _buckets(one),
        "prices": _prices(one, curves, usd),
        "slowest": _slowest(one),
        "scenarios": [*scenarios],
        "requests": _requests(one, usd),
        "chores": [{"kind": kind, "count": int((own := one.batches[one.batches.work == kind]).shape[0]),
                    "seconds": (own.ended - own.started).sum()} for kind in CHORES if (one.batches.work == kind).any()],
        "forgotten": one.about["forgotten"],
    }  # fmt: skip


def _over(value, whole):
    return value / whole if whole else None


def _none(value):
    return None if pd.isna(value) else value


def _totals(one, kinds):
    requests, batches = one.requests, one.batches
    work, done = batches[batches.work.isin(["rows", "guided"])], requests[requests.state == "done"]
    took = (done.ended - done.submitted).dropna()
    committed = sum(kinds[name] for name in ("committed", "guided", "finish", "refresh"))
    executed = sum(kinds.values())
    return {
        "requests": len(requests),
        **{f"{state}_requests": int((requests.state == state).sum()) for state in STATES},
        "committed_nfe": committed,
        "executed_nfe": executed,
        "cached_nfe": int(one.rows.nfe[one.rows.cached].sum()),
        "committed_per_second": committed / one.wall,
        "executed_per_second": executed / one.wall,
        "images": len(done),
        "images_per_second": len(done) / one.wall,
        "occupancy": _over(work.rows.sum(), work.bucket.sum()),
        "p50": took.quantile(0.5) if len(took) else None,
        "p95": took.quantile(0.95) if len(took) else None,
        "earlier_requests": len({*one.rows.request} - {*requests.request}),
        "unfinished_batches": int(batches.ended.isna().sum()),
        "failed_calls": int(one.calls.failed.sum()),
        "device_timed_batches": int(batches.forward_device_seconds.notna().sum()),
    }


def _limit(seconds, scenarios):
    whole = sum(seconds.values()) - seconds["queue"]
    causes = pd.Series({cause: sum(seconds[part] for part in parts) for cause, parts in CAUSES.items()})
    if whole <= 0 or not causes.any():
        return dict.fromkeys(("what", "share", "halved", "scenario", "then"))
    what, then = causes.idxmax(), None
    if what == "nothing":
        rest = causes.drop("nothing")
        then = {"what": rest.idxmax(), "share": rest.max() / (whole - causes["nothing"])} if rest.max() else None
    scaled = {"rewards": "reward"}.get(what, what)
    known = [
        s for s in scenarios if s["name"].split(" ")[0] == scaled and s["name"].count(" ") == 1 and " 0." in s["name"]
    ]
    best = sorted(known, key=lambda s: s["speedup"])[-1:]
    share = causes.max() / whole
    scenario = {"name": best[0]["name"], "speedup": best[0]["speedup"]} if best else None
    return {"what": what, "share": share, "halved": 1 / (0.5 * share + 1 - share), "scenario": scenario, "then": then}


def _beside(one):
    terms = [
        {"reward": name, "calls": len(own), "images": int(own.images.sum()), "failed": int(own.failed.sum()),
         "seconds": (own.ended - own.started).sum()}
        for name, own in one.calls.groupby("reward")
    ]  # fmt: skip
    decide = one.batches.decide_seconds.sum()
    return {
        "reward_seconds": one.batches[one.batches.work != "guided"].reward.sum(), "reward_overlap": one.overlap(),
        "judges": one.calls.thread.nunique(), "terms": terms, "decide_seconds": decide,
        "decide_share": decide / one.wall,
    }  # fmt: skip


def _timeline(one):
    batches = one.batches[~one.batches.chore & one.batches.ended.notna()].sort_values("started")
    counts = one.rows.pivot_table(index="batch", columns="spent", values="nfe", aggfunc="size", fill_value=0)
    counts = counts.reindex(index=batches.batch, columns=[*ROWS], fill_value=0)
    start, end = batches.started - one.begin, batches.ended - one.begin
    if batches.groupby("lane").size().max() > 200 or batches.lane.nunique() > 4:
        edges = np.linspace(0, one.wall, 161)
        pairs = [*pairwise(edges)]
        shares = [(np.minimum(end, b) - np.maximum(start, a)).clip(0) / (b - a) / one.lanes for a, b in pairs]
        rows = {name: [(share * counts[name].to_numpy()).sum() for share in shares] for name in ROWS}
        bucket = [(share * batches.bucket).sum() for share in shares]
        return {"binned": True, "seconds": one.wall, "edges": [*edges], "rows": rows, "bucket": bucket}
    found = []
    for lane, own in batches.groupby("lane"):
        rows = {name: [*counts.loc[own.batch, name]] for name in ROWS}
        times = {"started": [*start[own.index]], "ended": [*end[own.index]]}
        found.append({"lane": lane, **times, "bucket": [*own.bucket], "rows": rows})
    return {"binned": False, "seconds": one.wall, "lanes": found}


def _levels(one):
    rows = one.rows
    levels = sorted({*rows[rows.level >= 0].level})
    found = []
    for method, own in rows.groupby("method"):
        by, rest = own[own.level >= 0].groupby("level"), own[own.level < 0]
        found.append({
            "method": method,
            "nfe": [*by.nfe.sum().reindex(levels, fill_value=0)],
            "seconds": [*by.seconds.sum().reindex(levels, fill_value=0.0)],
            "padding_nfe": rest.nfe.sum(),
            "padding_seconds": rest[rest.nfe > 0].seconds.sum(),
            "image_seconds": rest[rest.nfe == 0].seconds.sum(),
        })  # fmt: skip
    return {"levels": levels, "methods": found}


def _methods(one):
    costs = one.costs
    batches = one.batches.set_index("batch")
    stages = {name: one.rows.batch.map(batches[column]) * _share(one, name) for name, column in _COLUMNS.items()}
    method = one.rows.drop_duplicates("request").set_index("request").method
    found = []
    for name, own in costs.groupby(method):
        mine = one.rows.method == name
        of = {f"{stage}_seconds": seconds[mine].sum() for stage, seconds in stages.items()}
        spent = {kind: own[kind].sum() for kind in SPENT}
        whole = {"nfe": own.nfe.sum(), "lane_seconds": own.seconds.sum()}
        rate = _over(own.seconds.sum(), own.nfe.sum())
        of["reward_seconds"] = own.rewards.sum()
        found.append({"method": name, "requests": len(own), **spent, **whole, "seconds_per_nfe": rate, **of})
    return found


_COLUMNS = {**{stage: stage for stage in LANE}, "decide": "decide", "host": "own"}


def _share(one, stage):
    """Each row's share of a stage of its batch."""
    batches = one.batches.set_index("batch")
    part, judged = 1.0 / one.rows.batch.map(batches.bucket), one.rows.batch.map(batches.judged)
    return (one.rows.scored / judged).where(judged > 0, part) if stage == "decode" else part


def _curves(one):
    kept = one.rows[one.rows.state == "kept"].copy()
    kept["answer"] = kept.batch.map(one.batches.set_index("batch").answer)
    found = []
    for request in one.requests.itertuples():
        own = kept[kept.request == request.request].sort_values(["answer", "batch", "number"])
        own = own.assign(spent=own.nfe.cumsum(), since=own.answer - request.submitted)
        own = own[own.reward.notna() & own.since.notna()]
        if not len(own):
            continue
        best = own.reward.cummax()
        steps = (best > best.shift(fill_value=-np.inf)).to_numpy(copy=True)
        steps[-1] = True
        found.append({
            "request": request.request, "method": request.method, "reward": request.reward, "judged": len(own),
            "first": own.reward.iloc[0], "nfe": [*own.spent[steps]], "seconds": [*own.since[steps]],
            "best": [*best[steps]],
        })  # fmt: skip
    drawn = {round(place) for place in np.linspace(0, len(found) - 1, min(16, len(found)))}
    return [{**curve, "drawn": place in drawn} for place, curve in enumerate(found)]


def _bands(curves):
    found = []
    for reward in dict.fromkeys(curve["reward"] for curve in curves):
        rest = [curve for curve in curves if curve["reward"] == reward and not curve["drawn"]]
        if len(rest) < 4:
            continue
        band = {"reward": reward, "requests": len(rest)}
        for axis in ("nfe", "seconds"):
            at = np.linspace(min(c[axis][0] for c in rest), max(c[axis][-1] for c in rest), 64)
            values = [[_value_at(c[axis], c["best"], x) for c in rest] for x in at]
            known = [[v for v in row if v is not None] for row in values]
            band[axis] = {"at": [*at]}
            for name, share in (("low", 0.1), ("middle", 0.5), ("high", 0.9)):
                band[axis][name] = [pd.Series(row).quantile(share) for row in known]
        found.append(band)
    return found


def _value_at(places, values, x):
    reached = [value for place, value in zip(places, values, strict=True) if place <= x]
    return reached[-1] if reached else None


def _buckets(one):
    batches = one.batches[(one.batches.work == "rows") & one.batches.ended.notna()]
    size = ["height", "width", "frames"]
    fits = {tuple(int(s["geometry"][n] or 0) for n in size): s["seconds"]
            for s in one.about.get("sizes", []) if s.get("measured", True)}  # fmt: skip
    found = []
    sizes = sorted({*fits, *batches[size].itertuples(index=False, name=None)})
    for key in sizes:
        own = batches[(batches[size] == list(key)).all(axis=1)]
        own = own.assign(
            network=own.propose + own.forward + own.finish, total=own.propose + own.forward + own.finish + own.decode
        )
        fit = {int(bucket): seconds for bucket, seconds in fits.get(key, {}).items()}
        whole = own[(own.judged == own.rows) & (own.decode > 0)]
        picked = own.iloc[np.linspace(0, len(own) - 1, min(600 // len(sizes), len(own))).round().astype(int)]
        medians = whole.groupby("bucket")[["network", "decode", "total"]].median()
        ratios = (whole.total / whole.bucket.map(fit)).dropna()
        found.append({
            **dict(zip(size, key, strict=True)), "batches": len(own), "decoded": len(whole),
            "fit": {"bucket": [*fit], "seconds": [*fit.values()]},
            "points": {"bucket": [*picked.bucket], "network": [*picked.network],
                       "decode": [value or None for value in picked.decode]},
            "table": [{"bucket": bucket, "batches": (whole.bucket == bucket).sum(), **row, "model": fit.get(bucket)}
                      for bucket, row in medians.to_dict("index").items()],
            "ratio": ratios.median() if len(ratios) else None,
        })  # fmt: skip
    return found


def _prices(one, curves, usd):
    per_second = None if usd is None else usd / 3600 / one.lanes
    costs, first = one.costs, {curve["request"]: curve["first"] for curve in curves}
    done = one.requests[one.requests.state == "done"].set_index("request")
    done["gain"] = done.score - done.index.map(pd.Series(first, dtype=float))
    done = done.join(costs[["nfe", "seconds"]].rename(columns={"nfe": "nfe_spent"}))
    found = []
    for (method, reward), own in done[done.seconds.notna()].groupby(["method", "reward"]):
        known = own[own.gain.notna()]
        row = {"method": method, "reward": reward, "images": len(own), "judged": len(known)}
        row["gain_per_image"] = known.gain.mean() if len(known) else None
        for name, some, whole in (("image", own, len(own)), ("point", known, known.gain.sum())):
            row[f"nfe_per_{name}"] = some.nfe_spent.sum() / whole if whole > 0 else None
            row[f"lane_seconds_per_{name}"] = s = some.seconds.sum() / whole if whole > 0 else None
            row[f"usd_per_{name}"] = None if usd is None or s is None else s * per_second
        found.append(row)
    rest = costs[~costs.index.isin(done.index)]
    spent = {"requests": len(rest), "nfe": rest.nfe.sum(), "lane_seconds": rest.seconds.sum()}
    whole = None if usd is None else usd * one.wall / 3600
    return {
        "usd_per_hour": usd, "usd_per_lane_second": per_second, "usd": whole, "images": len(done), "methods": found,
        "usd_per_image": None if usd is None or not len(done) else whole / len(done),
        "rest": {**spent, "usd": None if usd is None else spent["lane_seconds"] * per_second},
    }  # fmt: skip


def _slowest(one):
    batches = one.batches[~one.batches.chore & one.batches.ended.notna()].copy()
    batches["reward"] = batches.reward.where(batches.work == "guided", 0.0)
    parts = [*LANE, "reward", "host"]
    batches["host"] = (batches.took - batches[[*LANE, "reward"]].sum(axis=1)).clip(lower=0)
    kinds = batches.groupby(["work", "height", "width", "frames", "bucket", "judged"])
    usual, many = kinds[[*parts, "took"]].transform("median"), kinds.took.transform("size")
    compared = many >= 4
    slow = batches[compared & (batches.took > 1.1 * usual.took)]
    order = (slow.took - usual.took[slow.index]).sort_values(ascending=False, kind="stable").index[:8]
    listed = []
    for place in order:
        batch = batches.loc[place]
        more = (batch[parts] - usual.loc[place, parts]).astype(float)
        others = one.batches[one.batches.chore & (one.batches.lane != batch.lane)]
        both = (np.minimum(others.ended, batch.ended) - np.maximum(others.started, batch.started)).clip(lower=0)
        by = both.groupby(others.work).sum()
        beside = {"kind": by.idxmax(), "seconds": by.max()} if by.sum() else None
        listed.append({
            **{name: batch[name] for name in ("batch", "lane", "height", "width", "frames", "bucket", "rows", "work")},
            "began": batch.started - one.begin, "seconds": batch.took, "usual": usual.took[place],
            "cause": more.idxmax(), "by": more.max(), "of": usual.loc[place, more.idxmax()],
            "idle": _none(batch.idle), "beside": beside,
        })  # fmt: skip
    return {"compared": compared.sum(), "alone": (~compared).sum(), "slow": len(slow), "listed": listed}


def _requests(one, usd):
    spent = one.costs.seconds
    found = []
    for request in one.requests.itertuples():
        lane = spent.get(request.request)
        found.append({
            **{name: getattr(request, name) for name in ("prompt", "method", "reward", "stopped", "request", "nfe",
                                                         "committed", "executed", "state")},
            "wait": _none(request.started - request.submitted), "seconds": _none(request.ended - request.submitted),
            "score": _none(request.score), "held_out": _none(request.held_out), "lane_seconds": lane,
            "usd": None if lane is None or usd is None else lane * usd / 3600 / one.lanes,
        })  # fmt: skip
    return found
