"""The page of an evaluation, in English or Japanese."""

from collections.abc import Iterator, Sequence
from typing import Any

from mdiq.report.page import (
    Block,
    Chart,
    Document,
    Heading,
    Language,
    Page,
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
from mdiq.report.receipt_page import busy_warning, receipt_blocks

MIB = float(1 << 20)
KIB = float(1 << 10)


def evaluation_page(document: Document, language: Language) -> Page:
    """Return the page of Evaluation.as_document()."""
    words = Words(language)
    blocks: list[Block] = [Paragraph(_what_is_measured(words), "note"), *busy_warning(document, words)]
    for i, model in enumerate(document["models"]):
        blocks += _Model(document, words, i, model).blocks()
    blocks += receipt_blocks(document, words)
    blocks += [Heading(words.say("What this does not show", "この資料が示さないこと")), _not_shown(words)]
    return Page(
        language,
        words.word("Evaluation of a ring of devices", "デバイスリングの評価"),
        words.say(
            "Throughput, memory, generation time and bytes on the wire, {made}",
            "スループット、メモリ、生成時間、通信量（{made}）",
            made=Value("/receipt/made_at"),
        ),
        None,
        tuple(blocks),
    )


def _what_is_measured(words: Words) -> Text:
    return words.say(
        "Each ring ran on one machine, with a process for each device. Users ask with prompts of {prompt} random "
        "tokens and get {answer} tokens, greedy. Rates are those of decoding, after each user's first token.",
        "各リングは一台のマシンの上で、デバイスごとに一つのプロセスで動かした。利用者は{prompt}トークンの乱数プロンプトを送り、"
        "{answer}トークンの回答を貪欲法で受け取る。速度は各利用者の最初のトークン以降（デコード）の値である。",
        prompt=Value("/settings/prompt_tokens"),
        answer=Value("/settings/answer_tokens"),
    )


def _not_shown(words: Words) -> Paragraph:
    return Paragraph(
        words.say(
            "Processes on one machine share its memory bus and caches; devices do not. Prompts are random tokens, so "
            "nothing is said about the quality of answers. Models with random weights show speed, memory and bytes, "
            "which do not depend on the weights' values; their texts mean nothing. Memory of the first device includes "
            "the program that measures.",
            "同じマシンの上のプロセスはメモリ帯域とキャッシュを共有するが、実際のデバイスは共有しない。プロンプトは乱数なので、"
            "回答の品質については何も示さない。乱数の重みを持つモデルは速度・メモリ・通信量のみを示し（これらは重みの値によらない）、"
            "その文章に意味はない。最初のデバイスのメモリには計測プログラム自身も含まれる。",
        )
    )


class _Model:
    """The section of one model."""

    def __init__(self, document: Document, words: Words, index: int, model: dict[str, Any]) -> None:
        self._document, self._words, self._model = document, words, model
        self._at = f"/models/{index}"

    def blocks(self) -> Iterator[Block]:
        words, about = self._words, self._model["about"]
        yield Heading((self._value("about/name"),))
        yield Paragraph(
            words.say(
                "{layers} layers, hidden size {hidden}, {heads} query heads and {kv} KV heads. ",
                "{layers}層、隠れ次元{hidden}、クエリヘッド{heads}、KVヘッド{kv}。",
                layers=self._value("about/num_layers"),
                hidden=self._value("about/hidden_size"),
                heads=self._value("about/num_heads"),
                kv=self._value("about/num_kv_heads"),
            )
            + (self._random() if about["is_random"] else ())
        )
        yield self._throughput_table()
        yield self._throughput_chart()
        yield self._memory_chart()
        yield from self._generation()
        yield from self._wire()
        yield from self._attention()

    def _value(self, path: str, digits: int = 0, scale: float = 1.0, unit: str = "") -> Value:
        return Value(f"{self._at}/{path}", digits, scale, unit)

    def _point(self, x: float | str, value: Value) -> Point:
        return Point(x, float(look_up(self._document, value.pointer)) / value.scale, value)

    def _random(self) -> Text:
        words = self._words
        if self._model["about"]["family"] == "gpt2":
            return words.say(
                "The weights are random, in the shape of GPT-2: nothing was downloaded. Speed, memory and bytes are "
                "those of the shape; the texts mean nothing.",
                "重みは乱数で、形状はGPT-2と同じである（ダウンロードはしていない）。速度・メモリ・通信量は形状で決まり、文章に意味はない。",
            )
        return words.say(
            "The weights are random; speed, memory and bytes are those of the shape.",
            "重みは乱数である。速度・メモリ・通信量は形状で決まる。",
        )

    def _throughput_table(self) -> Table:
        words = self._words
        head = (
            words.say("devices", "デバイス数"),
            words.say("layers", "層"),
            words.say("tokens/s, one sample", "トークン/秒（単一サンプル）"),
            words.say("tokens/s, a sample per device", "トークン/秒（デバイス数のサンプル）"),
            words.say("gain", "倍率"),
            words.say("largest device, MiB", "最大のデバイス（MiB）"),
            words.say("of these weights, MiB", "うち重み（MiB）"),
        )
        rows = []
        for j, ring in enumerate(self._model["rings"]):
            at = f"rings/{j}"
            layers: list[Value | str] = []
            for k in range(len(ring["layers"])):
                layers += [", "] if k else []
                layers.append(self._value(f"{at}/layers/{k}"))
            most = _largest(ring)
            rows.append(
                (
                    (self._value(f"{at}/nodes"),),
                    tuple(layers),
                    (self._value(f"{at}/one/figures/decode_tokens_per_s", 2),),
                    (self._value(f"{at}/many/figures/decode_tokens_per_s", 2),),
                    (self._value(f"{at}/gain", 2),),
                    (self._value(f"{at}/peak_rss_bytes", 0, MIB),),
                    (self._value(f"{at}/many/nodes/{most}/weight_bytes", 0, MIB),),
                )
            )
        return Table(head, tuple(rows))

    def _throughput_chart(self) -> Chart:
        words = self._words
        parts = (
            ("one", words.word("one sample in flight", "単一サンプル")),
            ("many", words.word("as many samples as devices", "デバイス数のサンプル")),
        )
        return Chart(
            self._name("throughput"),
            words.word("Throughput against devices", "デバイス数とスループット"),
            words.word("devices", "デバイス数"),
            words.word("tokens/s", "トークン/秒"),
            tuple(
                Series(
                    name,
                    tuple(
                        self._point(
                            float(ring["nodes"]), self._value(f"rings/{j}/{part}/figures/decode_tokens_per_s", 2)
                        )
                        for j, ring in enumerate(self._model["rings"])
                    ),
                )
                for part, name in parts
            ),
        )

    def _memory_chart(self) -> Chart:
        words = self._words
        points = tuple(
            self._point(float(ring["nodes"]), self._value(f"rings/{j}/peak_rss_bytes", 0, MIB))
            for j, ring in enumerate(self._model["rings"])
        )
        weights = tuple(
            self._point(
                float(ring["nodes"]), self._value(f"rings/{j}/many/nodes/{_largest(ring)}/weight_bytes", 0, MIB)
            )
            for j, ring in enumerate(self._model["rings"])
        )
        return Chart(
            self._name("memory"),
            words.word("Memory of a device against devices", "デバイス数と一台あたりのメモリ"),
            words.word("devices", "デバイス数"),
            "MiB",
            (
                Series(words.word("largest process", "最大のプロセス"), points),
                Series(words.word("of these weights", "うち重み"), weights),
            ),
        )

    def _generation(self) -> Iterator[Block]:
        words, rings = self._words, self._model["rings"]
        series = []
        for j in dict.fromkeys((0, len(rings) - 1)):
            for k, generation in enumerate(rings[j]["generations"]):
                cache = (
                    words.word("KV cache", "KVキャッシュあり")
                    if generation["has_kv_cache"]
                    else words.word("no KV cache", "KVキャッシュなし")
                )
                nodes = rings[j]["nodes"]
                name = words.word(f"{nodes} {nouns(nodes, 'device')}, {cache}", f"{nodes}台、{cache}")
                points = [
                    self._point(float(n + 1), self._value(f"rings/{j}/generations/{k}/times_s/{n}", 2))
                    for n in range(len(generation["times_s"]))
                ]
                series.append(Series(name, tuple(points), is_predicted=False))
        yield Chart(
            self._name("generation"),
            words.word("Generation time against tokens", "生成トークン数と所要時間"),
            words.word("tokens of the answer", "回答のトークン数"),
            words.word("seconds", "秒"),
            tuple(series),
        )
        if all(g["is_same"] for ring in rings for g in ring["generations"]):
            yield Paragraph(
                words.say(
                    "All of these answers have the same tokens, on any number of devices, with and without a KV cache.",
                    "これらの回答のトークンは、デバイス数にもKVキャッシュの有無にもよらず、すべて同一である。",
                ),
                "good",
            )
        else:
            yield Paragraph(
                words.say(
                    "Some of these answers differ in their tokens; see is_same in the JSON.",
                    "トークンが一致しない回答がある（JSONのis_sameを参照）。",
                ),
                "bad",
            )

    def _wire(self) -> Iterator[Block]:
        words = self._words
        yield Heading(words.say("Bytes on the wire for a generated token", "生成トークンあたりの通信量"), 3)
        yield wire_table(words, self._at + "/wire", self._model["wire"])
        has_both = len({entry["has_kv_cache"] for entry in self._model["wire"]}) > 1
        if has_both:
            yield wire_chart(words, self._name("wire"), self._at + "/wire", self._model["wire"])
        yield Paragraph(wire_text(words, has_both=has_both))

    def _attention(self) -> Iterator[Block]:
        words, model = self._words, self._model
        yield Heading(
            words.say("KV memory: GQA and full multi-head attention", "KVメモリ：GQAとマルチヘッド注意（MHA）"), 3
        )
        kinds = [(model["about"], "about", "wire")]
        kinds += [] if model["full"] is None else [(model["full"], "full", "full_wire")]
        head = (
            words.say("attention", "注意機構"),
            words.say("KV heads", "KVヘッド"),
            words.say("KV cache of a token, KiB", "トークンあたりのKV（KiB）"),
            words.say("KV cache of {n} tokens, MiB", "{n}トークンのKV（MiB）", n=Value("/settings/example_tokens")),
            words.say("bytes of a token on the first hop", "最初のホップ（トークンあたりのバイト）"),
        )
        rows = []
        for about, at, wire in kinds:
            is_grouped = about["num_kv_heads"] < about["num_heads"]
            name = words.say("GQA", "GQA") if is_grouped else words.say("full multi-head", "マルチヘッド")
            rows.append(
                (
                    name,
                    (self._value(f"{at}/num_kv_heads"),),
                    (self._value(f"{at}/kv_bytes_per_token", 1, KIB),),
                    (self._value(f"{at}/example_kv_bytes", 1, MIB),),
                    (self._value(f"{wire}/0/first_per_token", 0),),
                )
            )
        yield Table(head, tuple(rows))
        yield Paragraph(gqa_text(words))

    def _name(self, what: str) -> str:
        return f"{self._at.rpartition('/')[2]}-{what}"


def wire_table(words: Words, at: str, entries: Sequence[dict[str, Any]]) -> Table:
    """Return HopBytes as a table. at: their place in the document."""
    head = (
        words.say("format", "形式"),
        words.say("KV cache", "KVキャッシュ"),
        words.say("tokens before it", "直前までのトークン数"),
        words.say("first hop, bytes", "最初のホップ（バイト）"),
        words.say("last hop, bytes", "最後のホップ（バイト）"),
        words.say("counted over tokens", "計数したトークン数"),
    )
    return Table(
        head,
        tuple(
            (
                (Value(f"{at}/{i}/wire"),),
                words.say("yes", "あり") if entry["has_kv_cache"] else words.say("no", "なし"),
                (Value(f"{at}/{i}/length"),),
                (Value(f"{at}/{i}/first_per_token"),),
                (Value(f"{at}/{i}/last_per_token"),),
                (Value(f"{at}/{i}/num_tokens"),),
            )
            for i, entry in enumerate(entries)
        ),
    )


def wire_chart(words: Words, name: str, at: str, entries: Sequence[dict[str, Any]]) -> Chart:
    """Return the bytes on the first Hop against the length, a line for each format with and without a KV cache."""
    series = []
    for wire, has_kv_cache in dict.fromkeys((entry["wire"], entry["has_kv_cache"]) for entry in entries):
        points = tuple(
            Point(
                float(entry["length"]),
                entry["first_per_token"] / KIB,
                Value(f"{at}/{i}/first_per_token", 2, KIB, " KiB"),
            )
            for i, entry in enumerate(entries)
            if (entry["wire"], entry["has_kv_cache"]) == (wire, has_kv_cache)
        )
        cache = words.word("KV cache", "KVあり") if has_kv_cache else words.word("no KV cache", "KVなし")
        series.append(Series(f"{wire}, {cache}", points))
    return Chart(
        name,
        words.word("Bytes of a generated token on the first hop", "生成トークンあたりの通信量（最初のホップ）"),
        words.word("tokens before it", "直前までのトークン数"),
        "KiB",
        tuple(series),
    )


def wire_text(words: Words, *, has_both: bool) -> Text:
    """Return what the bytes mean."""
    cached = words.say(
        "With a KV cache a token costs the same however long the text is: one row of activations on each hop. ",
        "KVキャッシュがあれば、文の長さによらずトークンあたりの通信量は一定で、各ホップを通るのは一トークン分の活性値だけである。",
    )
    if not has_both:
        return cached
    return cached + words.say(
        "Without one, every hop but the last carries a row for each token so far, so the bytes grow with the length. "
        "The last hop carries only the row that gives the token, either way.",
        "なければ、最後以外の各ホップをそれまでの全トークン分の活性値が通るため、通信量は長さとともに増える。"
        "最後のホップは、どちらの場合も次のトークンを決める一トークン分だけを運ぶ。",
    )


def gqa_text(words: Words) -> Text:
    """Return what GQA changes, and what it does not."""
    return words.say(
        "Grouped-query attention (GQA) changes nothing on the wire of a ring of layers: the hidden state travels "
        "between devices, and its width does not depend on the number of KV heads. Keys and values never leave their "
        "device. GQA makes the KV cache smaller, in the ratio of KV heads to query heads, and saves computing.",
        "GQA（Grouped-Query Attention）は、層リングの通信量を変えない。"
        "デバイス間を流れるのは隠れ状態であり、その幅はKVヘッド数によらない。"
        "キーとバリューはデバイスの外に出ない。"
        "GQAはKVキャッシュを（KVヘッド数／クエリヘッド数の比で）小さくし、計算も減らす。",
    )


def _largest(ring: dict[str, Any]) -> int:
    """Return which node of a ring had the largest process."""
    nodes = ring["many"]["nodes"]
    return max(range(len(nodes)), key=lambda k: float(nodes[k]["rss_bytes"]))
