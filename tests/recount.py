"""The figures of a report once more, from the exported Parquet with pandas: nothing here is taken from the report.

What lasted how long is counted moment by moment: time is cut wherever anything begins or ends.
"""

import json
from functools import cached_property

import numpy as np
import pandas as pd

LANE = ("propose", "forward", "finish", "backward", "decode")
SPENT = ("committed", "guided", "finish", "refresh", "speculative", "padding")
CHORES = ("encode", "measure", "start", "peek", "other")
IDLE = ("idle_rewards", "idle_loop", "idle_rows", "idle_nothing")
PARTS = (*LANE, "reward", "host", "queue", *CHORES, *IDLE, "outside")
CAUSES = {
    "forward": ["forward"], "decode": ["decode"], "backward": ["backward"], "propose": ["propose"],
    "finish": ["finish"], "rewards": ["reward", "idle_rewards"], "host": ["host", "idle_loop"], "chores": CHORES,
    "rows": ["idle_rows"], "nothing": ["idle_nothing"],
}  # fmt: skip


class Recount:
    """Reads a folder of a recording, and counts."""

    def __init__(self, folder):
        about = json.loads((folder / "recording.json").read_text())
        files = {"rows": "ledger", "batches": "batches", "calls": "calls", "requests": "requests"}
        for name, file in files.items():
            setattr(self, name, pd.read_parquet(folder / f"{file}.parquet"))
        self.about, self.begin, self.end = about, about["begin"], about["end"]
        lost = {**about["forgotten"]}
        if (lost.get("rows") or lost.get("batches")) and len(self.batches):
            first = self.batches.batch.iloc[0]
            if lost.get("rows"):
                first = max(first, self.rows.batch.iloc[0] + 1)
            self.rows, self.batches = (one[one.batch >= first] for one in (self.rows, self.batches))
            self.begin = self.batches.chosen.min()
        self.wall = self.end - self.begin
        self._prepare()

    def _prepare(self):
        rows, batches = self.rows, self.batches
        rows["spent"] = rows.kind
        ran = ~rows.kind.isin(["padding", "image"])
        rows.loc[ran & (rows.state == "dropped"), "spent"] = "speculative"
        rows.loc[ran & (rows.state == "open"), "spent"] = "open"
        for stage in (*LANE, "reward", "decide"):
            timed = batches.get(f"{stage}_device_seconds", pd.Series(np.nan, batches.index))
            batches[stage] = timed.fillna(batches[f"{stage}_seconds"])
        batches["done"] = batches.ended
        for stage in ("forward", "backward", "decode"):
            until = batches[f"{stage}_device_started"] + batches[f"{stage}_device_seconds"]
            batches["done"] = np.fmax(batches.done, until).where(batches.ended.notna())
        batches["took"] = batches.done - batches.started
        batches["chore"] = batches.work.isin(CHORES)
        guided = batches.work == "guided"
        own = batches.host.fillna(0.0)
        for stage in ("forward", "backward", "decode"):
            own = own - (batches[stage] - batches[f"{stage}_seconds"])
        own = own - (batches.reward - batches.reward_seconds).where(guided, 0.0)
        batches["own"] = own.clip(lower=0.0)
        batches["judgement"] = batches.reward_ended.fillna(batches.done)
        batches["answer"] = batches.decide_ended.fillna(batches.judgement)
        batches["whole"] = batches[[*LANE]].sum(axis=1) + batches.own
        merged = rows.merge(batches.drop(columns=["rows"]), on="batch", how="left", suffixes=("", "_of_batch"))
        part = 1.0 / merged.bucket
        seen = (merged.scored / merged.judged).where(merged.judged > 0, part)
        lane = merged[["propose", "forward", "finish", "backward", "own"]].sum(axis=1) * part + merged.decode * seen
        rows["lane"] = lane.fillna(0.0).to_numpy()
        on_lane = (merged.reward_of_batch * seen).where(merged.work == "guided", 0.0)
        rows["seconds"] = rows.lane + on_lane.to_numpy()
        specs = {int(number): spec["method"] for number, spec in self.about["specs"].items()}
        known = self.requests.set_index("request").method
        rows["method"] = rows.request.map(known).fillna(rows.request.map(specs))
        self.lanes = int(max([self.about.get("lanes", 0), *(batches.lane + 1)]))

    # Times.

    def _moments(self):
        """Every stretch of the recording in which nothing begins or ends: middles and lengths."""
        times = self.batches.filter(regex="(started|ended|chosen|done)$").to_numpy().ravel()
        device = [self.batches[f"{s}_device_started"] + self.batches[f"{s}_device_seconds"] for s in LANE[1::2]]
        device.append(self.batches.decode_device_started + self.batches.decode_device_seconds)
        first = self.batches.started - self.batches.idle
        others = self.requests[["submitted", "ended"]].to_numpy().ravel()
        times = np.concatenate([times, *device, first, others, [self.begin, self.end], self.batches.answer])
        times = np.unique(times[(times >= self.begin) & (times <= self.end)])
        return (times[1:] + times[:-1]) / 2, np.diff(times)

    def lane_time(self):
        at, length = self._moments()

        def within(starts, ends):
            starts, ends = np.asarray(starts, float), np.asarray(ends, float)
            return ((starts[:, None] < at) & (at < ends[:, None])).any(0) if len(starts) else np.zeros(len(at), bool)

        batches, found = self.batches, []
        live = within(self.requests.submitted, self.requests.ended.fillna(self.end))
        for _, own in self.rows[~self.rows.request.isin(self.requests.request)].groupby("request"):
            end = batches[batches.batch.isin(own.batch)].answer.max()
            live |= (at < end) if end == end else False
        loop = within(batches.chosen, batches.started) | within(batches.judgement, batches.decide_ended)
        beside = batches[batches.work != "guided"]
        rewards = within(beside.reward_started, beside.reward_ended)
        taken = []
        for lane in range(self.lanes):
            own = batches[batches.lane == lane].sort_values("started")
            ran = within(own.started, own.done)
            outside = within(own.started.where(own.ended.isna()), own.ended.fillna(self.end))
            if len(own):
                outside |= at < own.started.iloc[0] - own.idle.iloc[0]
            taken.append((own, ran, outside & ~ran))
        for lane, (own, ran, outside) in enumerate(taken):
            over, seconds = own[own.ended.notna()], {}
            for stage in LANE:
                seconds[stage] = over[~over.chore][stage].sum()
            seconds["reward"] = over[over.work == "guided"].reward.sum()
            for kind in CHORES:
                chores = over[over.work == kind]
                seconds[kind] = (chores.ended - chores.started).sum()
            rest = max(0.0, length[ran].sum() - sum(seconds.values()))
            timed = np.zeros(len(at), bool), np.zeros(len(at), bool)
            for mine, stage in ((mine, stage) for mine in (0, 1) for stage in ("forward", "backward", "decode")):
                some = batches[(batches.lane == lane) == bool(mine)]
                until = some[f"{stage}_device_started"] + some[f"{stage}_device_seconds"]
                timed[mine][:] |= within(some[f"{stage}_device_started"], until)
            launched = within(own.propose_started, own.propose_ended) | within(own.finish_started, own.finish_ended)
            seconds["queue"] = min(rest, length[ran & ~timed[1] & ~launched & timed[0]].sum())
            seconds["host"] = rest - seconds["queue"]
            busy = np.zeros(len(at), bool)
            for other, pair in enumerate(taken):
                busy |= (pair[1] | pair[2]) & (other != lane)
            gap, seconds["outside"] = ~ran & ~outside, length[outside].sum()
            seconds["idle_nothing"] = length[gap & ~live].sum()
            gap &= live
            seconds["idle_loop"] = length[gap & (loop | ~(rewards | busy))].sum()
            seconds["idle_rewards"] = length[gap & ~loop & rewards].sum()
            seconds["idle_rows"] = length[gap & ~loop & ~rewards & busy].sum()
            found.append({"lane": lane, "seconds": {part: seconds[part] for part in PARTS}})
        return found

    def overlap(self):
        at, length = self._moments()
        busy = self.batches[self.batches.ended.notna()]
        ran = ((busy.started.to_numpy()[:, None] < at) & (at < busy.ended.to_numpy()[:, None])).any(0)
        total = shared = 0.0
        for _, one in self.batches[(self.batches.work != "guided") & self.batches.reward_started.notna()].iterrows():
            inside = (one.reward_started < at) & (at < one.reward_ended)
            total, shared = total + length[inside].sum(), shared + length[inside & ran].sum()
        return shared / total if total else None

    @cached_property
    def costs(self):
        """Lane seconds, NFE by what they were for, and seconds of rewards, by request."""
        rows = self.rows
        table = pd.DataFrame({"seconds": rows.groupby("request").lane.sum()})
        nfe = rows.pivot_table(index="request", columns="spent", values="nfe", aggfunc="sum", fill_value=0)
        for name in SPENT:
            table[name] = nfe.get(name, pd.Series(0, table.index)).astype(int)
        table["nfe"] = table[[*SPENT]].sum(axis=1)
        share, several = pd.Series(0.0, table.index), self.calls.reward.nunique() > 1
        for _, batch in self.batches[~self.batches.chore].iterrows():
            own = rows[rows.batch == batch.batch]
            viewers = own[own.scored] if own.scored.any() else own
            calls = self.calls[self.calls.batch == batch.batch]
            if not several or not len(calls):
                shares = [(viewers, batch.reward)]
            else:
                took = calls.ended - calls.started
                shares = [(self._asked(viewers, one.reward), batch.reward * (one.ended - one.started) / took.sum())
                          for one in calls.itertuples()]  # fmt: skip
            for who, seconds in shares:
                for request in who.request:
                    share[request] += seconds / len(who)
                    table.loc[request, "seconds"] += seconds / len(who) * (batch.work == "guided")
        return table.assign(rewards=share)

    def _asked(self, viewers, reward):
        specs = self.about["specs"]
        of = [specs[str(request)] for request in viewers.request]
        asked = np.array([reward in spec["terms"] for spec in of])
        held_out = np.array([reward in (spec["held_out"] or []) for spec in of])
        own = viewers[asked | (held_out & (viewers.kind == "image"))]
        return own if len(own) else viewers
