"""Made-up paragraphs with and without lexical fusions, a dictionary of sememes for their words, and a tiny encoder.

    python examples/lexical_fusion/made.py DIR      # train.jsonl, valid.jsonl, hownet.txt, sememe_vector.txt, encoder

A fusion word takes a character of each of two words, and stands in a sentence of its own before or behind theirs.
Three in ten paragraphs have no fusion: nothing, or another word, stands in the place of the fusion word. Fusion
words of `valid.jsonl` are none of `train.jsonl`; a character has the same sememe in every word. Most words are put
together by chance, so that there are enough of them. A small model learns in minutes: it shows that all runs, and no
more. Every line is marked as synthetic.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import task_runs  # the folder above has what examples of tasks share

TRIPLES = {
    "train": (
        "撤出 部队 撤军", "死亡 受伤 死伤", "预先 支付 预付", "调查 研究 调研", "检验 测试 检测", "招收 学生 招生",
        "降低 价格 降价", "提高 速度 提速", "增加 产量 增产", "购买 房屋 购房", "采集 购买 采购", "生产 销售 产销",
        "核实 查验 核查", "修建 道路 修路", "签订 合约 签约", "环境 保护 环保", "科学 技术 科技", "交通 警察 交警",
        "扶助 贫困 扶贫", "控制 烟草 控烟", "抵抗 洪水 抗洪", "储存 粮食 储粮", "拍摄 照片 拍照", "治疗 疾病 治病",
    ),
    "valid": (
        "维护 修理 维修", "减少 税收 减税", "研究 制造 研制", "教育 改革 教改", "安全 检查 安检", "治理 污染 治污",
        "防止 火灾 防火", "节约 能源 节能", "恢复 工作 复工", "停止 产出 停产",
    ),
}  # fmt: skip
"""Two words and the one that stands for both; no fusion word is in two lists."""
BOTH = (
    "为了{a}，他们先看了{b}。", "昨天有人谈到{a}和{b}。", "会上先说了{a}，再说了{b}。", "大家都关心{a}与{b}的事。",
)  # fmt: skip
"""Sentences with both words."""
ONE = ("这次{f}已经完成。", "关于{f}的消息很多。", "记者说{f}不难。", "{f}从今天开始。")
"""Sentences with the fusion word, or with one that is none."""
REST = ("天气很好。", "大家都来了。", "其他情况没有变化。", "会议在下午结束。")
COMPOSED = {"train": 300, "valid": 60}
"""Triples of characters of those above, put together by chance."""
POOL = 40
"""Characters that composed triples are of: few, so that each is met often."""
WITHOUT = 0.3
"""The share of paragraphs without a fusion."""
SIZE = 16
"""Numbers of a sememe."""


def triples(kind: str) -> tuple[str, ...]:
    """Those of a list, and composed ones whose fusion words are in no other list."""
    characters = sorted({c for rows in TRIPLES.values() for c in "".join(rows) if c != " "})
    used = {row.split()[2] for rows in TRIPLES.values() for row in rows}
    for word, count in COMPOSED.items():
        draw, found = random.Random(word), list(TRIPLES[word])
        while len(found) < count:
            a, b, c, d = draw.sample(characters[:POOL], 4)
            fused = draw.choice((a, b)) + draw.choice((c, d))
            if fused not in used:
                used.add(fused)
                found.append(f"{a}{b} {c}{d} {fused}")
        if word == kind:
            return tuple(found)
    raise ValueError(f"{kind} is none of {', '.join(COMPOSED)}")


def paragraph(draw: random.Random, name: str, words: tuple[str, ...]) -> dict[str, Any]:
    """One paragraph over the triples of a list."""
    a, b, f = draw.choice(words).split()
    has = draw.random() >= WITHOUT
    if not has:
        f = draw.choice((*draw.choice(words).split()[:2], a, b))
    sentences = [draw.choice(BOTH).format(a=a, b=b), draw.choice(ONE).format(f=f)]
    if not has and draw.random() < 0.5:
        sentences.pop()
    draw.shuffle(sentences)
    sentences.insert(draw.randint(0, len(sentences)), draw.choice(REST))
    text = "".join(sentences)
    made = {"id": name, "text": text, "fusion": None, "separations": [], "synthetic": True}
    if has:
        places = {w: text.index(w) for w in (a, b, f)}
        made |= {
            "fusion": [places[f], places[f] + 2, f],
            "separations": [[places[w], places[w] + 2, w] for w in (a, b)],
            "char_links": [[places[f], 0], [places[f] + 1, 1]],
            "extra": {"fusion": [], "A": [], "B": []},
        }
    return made


def write(file: Path, count: int, seed: int, kind: str = "train") -> Path:
    """A file of so many paragraphs over a list of triples."""
    draw, words = random.Random(seed), triples(kind)
    rows = (paragraph(draw, f"{seed}-{i}", words) for i in range(count))
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return file


def dictionary(place: Path) -> None:
    """Sememes of all words, one for each character, and what they begin as, which the last one lacks."""
    words = sorted({w for kind in TRIPLES for row in triples(kind) for w in row.split()})
    lines = [f"{w}\n{' '.join(f'义{c}' for c in w)} " for w in words]
    (place / "hownet.txt").write_text("\n".join(lines) + "\n", "utf-8")
    draw = random.Random(0)
    names = sorted({f"义{c}" for w in words for c in w})[:-1]
    rows = (f"{n} {' '.join(f'{draw.gauss(0, 0.5):.4f}' for _ in range(SIZE))} \n" for n in names)
    (place / "sememe_vector.txt").write_text("".join(rows), "utf-8")


def encoder(place: Path, hidden: int = 32) -> Path:
    """A transformers directory of a tiny BERT, with a tokenizer that knows the characters."""
    texts = [*BOTH, *ONE, *REST, *(row for rows in TRIPLES.values() for row in rows)]
    return task_runs.tiny_encoder(place, [" ".join(text) for text in texts], hidden)


def main() -> int:
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    write(place / "train.jsonl", 600, 0)
    write(place / "valid.jsonl", 100, 1, "valid")
    dictionary(place)
    encoder(place / "encoder")
    print(f"{place} is ready")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
