"""Sections of a trial's page that show what was measured: memory, bytes, devices, recovery."""

from collections.abc import Iterator
from typing import Any

from mdiq.report.evaluation_page import KIB, MIB, gqa_text, wire_chart, wire_table, wire_text
from mdiq.report.page import (
    Block,
    Chart,
    Document,
    Heading,
    Mark,
    Paragraph,
    Point,
    Series,
    Table,
    Text,
    Value,
    Words,
    look_up,
    nouns,
)

GIB = float(1 << 30)
PERCENT = 0.01


def stage_name(words: Words, at: str, stage: dict[str, Any]) -> Text:
    """Return a stage's name, with its number of devices."""
    nodes, devices = Value(f"{at}/nodes"), nouns(stage["nodes"], "device")
    if stage["name"] == "alone":
        return words.say("one device, the whole model", "一台にモデル全体")
    if stage["name"] == "now":
        return words.say(f"as it stands: {{n}} {devices}", "現状：{n}台", n=nodes)
    phase = _phase(words, stage)
    split = words.word("planned split", "計画配分") if stage["is_planned"] else words.word("even split", "均等配分")
    return words.say(f"{phase}: {{n}} devices, {split}", f"{phase}：{{n}}台、{split}", n=nodes)


class Sections:
    """The sections of one document."""

    def __init__(self, document: Document, words: Words) -> None:
        self._document, self._words = document, words
        self._last = f"/stages/{len(document['stages']) - 1}"
        self._stage = document["stages"][-1]

    @staticmethod
    def label(words: Words, stage: dict[str, Any]) -> str:
        """Return a stage's name for a chart."""
        n = stage["nodes"]
        if n == 1:
            return words.word("1 device", "一台")
        if stage["name"] == "now":
            return words.word(f"{n} devices", f"{n}台")
        phase = _phase(words, stage)
        return words.word(f"{phase}: {n} devices", f"{phase}：{n}台")

    def memory(self) -> Iterator[Block]:
        words = self._words
        yield Heading(words.say("Memory of a device", "デバイスのメモリ"))
        places = [("/alone", self._document["alone"])] if self._document["alone"] else []
        places += [(f"/stages/{i}", stage) for i, stage in enumerate(self._document["stages"])]
        parts = (
            ("devices/{k}/rss_bytes", words.word("process, measured", "プロセス（計測）")),
            ("devices/{k}/weight_bytes", words.word("of these its weights", "うち重み")),
            ("kv_bytes/{k}", words.word("KV cache when it is full", "満杯時のKVキャッシュ")),
        )
        series = []
        for part, name in parts:
            points = []
            for at, stage in places:
                most = max(range(len(stage["devices"])), key=lambda k: stage["devices"][k]["rss_bytes"])  # noqa: B023
                if part.startswith("kv_bytes") and not stage["kv_bytes"]:
                    continue
                value = Value(f"{at}/{part.format(k=most)}", 0, MIB, " MiB")
                points.append(Point(self.label(words, stage), self._number(value), value))
            series.append(Series(name, tuple(points)))
        yield Chart(
            "memory",
            words.word("Memory of the largest device", "最大のデバイスのメモリ"),
            words.word("stage", "段階"),
            "MiB",
            tuple(series),
            "bar",
        )
        memory = self._document["memory"]
        if memory["one_device_bytes"] is None:
            return
        given = (
            words.say("as given", "指定値")
            if memory["is_given"]
            else words.say("this machine's, none was given", "指定がないためこのマシンの値")
        )
        yield Paragraph(
            words.say(
                "The whole model took {one} GiB on one device. A device has {device} GiB (",
                "モデル全体は一台で{one} GiBを使った。一台のメモリは{device} GiB（",
                one=Value("/memory/one_device_bytes", 2, GIB),
                device=Value("/memory/device_bytes", 2, GIB),
            )
            + given
            + words.say(").", "）。")
        )

    def wire(self) -> Iterator[Block]:
        words, document = self._words, self._document
        if document["wire"]:
            yield Heading(words.say("Bytes on the wire for a generated token", "生成トークンあたりの通信量"))
            yield wire_table(words, "/wire", document["wire"])
            yield wire_chart(words, "wire", "/wire", document["wire"])
            yield Paragraph(wire_text(words, has_both=True))
        if not document["attention"]:
            return
        yield Heading(words.say("GQA and full multi-head attention", "GQAとマルチヘッド注意（MHA）"), 3)
        head = (
            words.say("attention", "注意機構"),
            words.say("KV heads", "KVヘッド"),
            words.say("KV cache of a token, KiB", "トークンあたりのKV（KiB）"),
        )
        rows = (
            (
                words.say("this model", "このモデル"),
                (Value("/model/num_kv_heads"),),
                (Value("/attention/kv_bytes_per_token", 1, KIB),),
            ),
            (
                words.say("full multi-head (computed)", "マルチヘッド（計算値）"),
                (Value("/model/num_heads"),),
                (Value("/attention/full_kv_bytes_per_token", 1, KIB),),
            ),
        )
        yield Table(head, rows)
        yield Paragraph(gqa_text(words))

    def devices(self) -> Iterator[Block]:
        words, at = self._words, self._last
        yield Heading(words.say("The devices of the last stage", "最後の段階のデバイス"))
        head = (
            words.say("device", "デバイス"),
            words.say("layers", "層"),
            words.say("busy", "計算中"),
            words.say("work waited", "待ち"),
            words.say("memory, MiB", "メモリ（MiB）"),
            words.say("bytes per row on its hop", "ホップの通信量（一トークン分あたりバイト）"),
        )
        count = range(len(self._stage["devices"]))
        rows = tuple(
            (
                (Value(f"{at}/devices/{i}/name"),),
                (Value(f"{at}/devices/{i}/layers"),),
                (Value(f"{at}/devices/{i}/busy_share", 0, PERCENT, " %"),),
                (Value(f"{at}/devices/{i}/waiting_share", 1, PERCENT, " %"),),
                (Value(f"{at}/devices/{i}/rss_bytes", 0, MIB),),
                (Value(f"{at}/devices/{i}/bytes_per_token"),),
            )
            for i in count
        )
        yield Table(head, rows)
        points = []
        for i in count:
            value = Value(f"{at}/devices/{i}/busy_share", 0, PERCENT, " %")
            points.append(Point(self._stage["devices"][i]["name"], self._number(value), value))
        yield Chart(
            "busy",
            words.word("Busy share of each device, all users", "各デバイスの計算時間の割合（全員）"),
            words.word("device", "デバイス"),
            "%",
            (Series(words.word("busy", "計算中"), tuple(points)),),
            "bar",
        )
        if self._stage["hops"]:
            yield Table(
                (
                    words.say("hop", "ホップ"),
                    words.say("format", "形式"),
                    words.say("delay, ms", "遅延（ms）"),
                    words.say("bandwidth, Mbit/s", "帯域（Mbit/s）"),
                ),
                tuple(
                    (
                        words.say("out of {name}", "{name}から", name=Value(f"{at}/devices/{i}/name")),
                        (Value(f"{at}/hops/{i}/wire"),),
                        (Value(f"{at}/hops/{i}/delay_s", 1, 1e-3),),
                        (Value(f"{at}/hops/{i}/bytes_per_s", 0, 1e6 / 8),),
                    )
                    for i in range(len(self._stage["hops"]))
                ),
            )

    def recovery(self) -> Iterator[Block]:
        words = self._words
        yield Heading(words.say("Recovery drill", "障害復旧の訓練"))
        drills = [(i, stage) for i, stage in enumerate(self._document["stages"]) if stage["drill"] is not None]
        if not drills:
            yield Paragraph(
                words.say(
                    "There was no drill: no device was killed.", "訓練は行っていない（デバイスを停止していない）。"
                ),
                "note",
            )
            return
        chosen = self._document["settings"].get("drill_node")
        killed = words.say(
            "of the device with the most layers (the first one measures, and stayed)",
            "層が最も多いデバイス（計測を行う先頭を除く）",
        )
        if chosen is not None:
            place = Value("/settings/drill_node")
            killed = words.say(
                "of {node} (where a stage does not have it, of the device with the most layers)",
                "{node}（その段階にない場合は層が最も多いデバイス）",
                node=place,
            )
        yield Paragraph(
            words.say("While all users waited for their answers, the process ", "全利用者が回答を待つ間に、")
            + killed
            + words.say(
                " was killed. The ring started it again and computed the lost tokens' cache anew.",
                "のプロセスを強制終了した。リングはそれを再起動し、失われたキャッシュを計算し直した。",
            )
            + words.say(
                " Seconds: the kill and its notice count from the question; ring, layers and first token from the "
                "notice; and until all went on, from the kill.",
                "秒数の起点：停止と検知は要求から、リング確定・層の読込・最初のトークンは検知から、"
                "全要求の再開は停止から。",
            )
        )
        head = (
            words.say("stage", "段階"),
            words.say("device", "停止したデバイス"),
            words.say("killed, s", "停止（秒）"),
            words.say("noticed, s", "検知（秒）"),
            words.say("ring found, s", "リング確定（秒）"),
            words.say("layers loaded, s", "層の読込（秒）"),
            words.say("first token, s", "最初のトークン（秒）"),
            words.say("all went on, s", "全要求の再開（秒）"),
            words.say("longest silence, s", "最長の無応答（秒）"),
            words.say("equal answers", "一致した回答"),
        )
        rows = []
        for i, stage in drills:
            at = f"/stages/{i}/drill"
            timeline: list[Text] = [
                (Value(f"{at}/timeline/{name}", 2),) if name in stage["drill"]["timeline"] else ("–",)
                for name in ("back_s", "loaded_s", "first_token_s")
            ]
            rows.append(
                (
                    stage_name(words, f"/stages/{i}", stage),
                    (Value(f"{at}/node"),),
                    (Value(f"{at}/killed_s", 2),),
                    (Value(f"{at}/noticed_s", 2),),
                    *timeline,
                    (Value(f"{at}/recovered_s", 2),),
                    (Value(f"{at}/gap_s", 2),),
                    (Value(f"{at}/equal"), " / ", Value(f"{at}/users")),
                )
            )
        yield Table(head, tuple(rows))
        yield self._progress(*drills[-1])
        for i, stage in drills:
            if stage["drill"]["error"]:
                text = words.say(
                    "A request failed: {error}", "要求が失敗した：{error}", error=Value(f"/stages/{i}/drill/error")
                )
                yield Paragraph(text, "bad")

    def _progress(self, i: int, stage: dict[str, Any]) -> Chart:
        words, at = self._words, f"/stages/{i}/drill"
        points = tuple(
            Point(entry["at_s"], float(entry["tokens"]), Value(f"{at}/progress/{k}/tokens"))
            for k, entry in enumerate(stage["drill"]["progress"])
        )
        marks = [Mark(Value(f"{at}/killed_s", 2), stage["drill"]["killed_s"], words.word("killed", "停止"))]
        if stage["drill"]["recovered_s"] is not None:
            on_s = stage["drill"]["killed_s"] + stage["drill"]["recovered_s"]
            marks.append(Mark(Value(f"{at}/recovered_s", 2), on_s, words.word("all went on", "再開")))
        return Chart(
            "recovery",
            words.word("Tokens of all users while a device is lost", "デバイス停止時の全利用者のトークン数"),
            words.word("seconds since they asked", "要求からの秒数"),
            words.word("tokens", "トークン数"),
            (Series(words.word("tokens that have come", "届いたトークン"), points),),
            "line",
            tuple(marks),
        )

    def _number(self, value: Value) -> float:
        return float(look_up(self._document, value.pointer)) / value.scale


def _phase(words: Words, stage: dict[str, Any]) -> str:
    phases = {
        "few": words.word("few", "少数"),
        "tuned": words.word("tuned", "調整"),
        "all": words.word("all", "全体"),
    }
    return phases[stage["name"]]
