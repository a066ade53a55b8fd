"""The data sets of the application. Imports neither torch nor numpy."""

from __future__ import annotations

from pathlib import Path

from attn_shared.app import DataCard, listed_files

FILE_FORMATS = (
    "Single voices, of which mixtures are made on the way: a folder for each speaker (perhaps inside of folders train, "
    "val and test), LibriSpeech's folders, or a CSV with the columns file and speaker (perhaps sex and split), files "
    "named relative to it. Mixtures with their voices: folders mix, s1, s2 (s3, noise) that hold the same file names "
    "(perhaps inside of tr, cv and tt), wsj0-mix's or LibriMix's folders, LibriMix's tables, or a CSV with the columns "
    "mixture, source_1, source_2 (perhaps source_3, noise, speaker_1, sex_1, name and split). A folder may hold such a "
    "table as utterances.csv or mixtures.csv. Sound files: WAV, FLAC, OGG and what else libsndfile reads, of any rate. "
    "`predict` takes sound files as they are."
)
FILE_SUFFIXES = (".wav", ".csv", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64", ".rf64")

_CHECKSUMS = Path(__file__).with_name("checksums.txt")
_ROOM = "2 or 3 voices (--data_args.speakers), 8 or 16 kHz (rate), min or max (mode)"

DATASETS: dict[str, DataCard] = {
    card.name: card
    for card in (
        DataCard(
            name="synthetic",
            title="Synthetic speech: sentences spoken by a formant synthesiser",
            task="mixtures of 2 or 3 synthetic voices, made on the way",
            licence="made by this application; CC0 1.0",
            source="espeak-ng 1.52, our own sentences; apps/speech/tools/make_synthetic.py makes it anew",
            size="40 voices, 320 clips, 14 minutes at 8 kHz, 3.4 MB in the package",
            split="by voice: 28 train, 4 validation, 8 test",
            citation="none",
            embedded=True,
            synthetic=True,
        ),
        DataCard(
            name="librispeech_mini",
            title="LibriSpeech mini: 261 readers, 8 kHz",
            task="mixtures of 2 or 3 readers, made on the way",
            licence="CC BY 4.0, (c) 2014 Vassil Panayotov",
            source="github.com/resemble-ai/Resemblyzer (commit 15d828e), audio_data/librispeech_*, resampled to 8 kHz",
            size="351 utterances, 65 minutes, 37 MB",
            split="by speaker: 10 to test, a share of the 251 training speakers (val) to validation",
            citation="V. Panayotov et al., LibriSpeech: an ASR corpus based on public domain audio books, ICASSP 2015",
            subdir="speech",
            files=listed_files(_CHECKSUMS, "librispeech_mini_8k/"),
            manual="take audio_data/librispeech_train-clean-100 and librispeech_test-other of "
            "github.com/resemble-ai/Resemblyzer, resample to 8 kHz FLAC into $ATTN_DATA/speech/librispeech_mini_8k/"
            "train and test, and name them in utterances.csv (file, speaker, sex, split)",
            facts={"trap": "training is of clean recordings, test of LibriSpeech's harder ones (test-other)"},
        ),
        DataCard(
            name="librispeech",
            title="LibriSpeech",
            task="mixtures of 2 or 3 readers, made on the way",
            licence="CC BY 4.0",
            source="openslr.org/12",
            size="train-clean-100: 251 readers, 100 hours, 6.3 GB; dev and test: 5 hours each",
            split="by speaker, LibriSpeech's own train-*, dev-*, test-*",
            citation="V. Panayotov et al., LibriSpeech: an ASR corpus based on public domain audio books, ICASSP 2015",
            subdir="speech",
            manual="download the parts wanted from openslr.org/12 and unpack them into $ATTN_DATA/speech/LibriSpeech, "
            "SPEAKERS.TXT beside them",
        ),
        DataCard(
            name="wsj0_mix",
            title="wsj0-2mix and wsj0-3mix",
            task=f"mixtures of read news, {_ROOM}",
            licence="that of WSJ0 (LDC93S6A), for its licensees only; none of it is distributed here",
            source="www.merl.com/research/highlights/deep-clustering and LDC93S6A",
            size="20000 training, 5000 validation, 3000 test mixtures",
            split="its own tr, cv, tt: tt has other speakers, cv has those of tr",
            citation="J. R. Hershey et al., Deep Clustering: Discriminative Embeddings for Segmentation and "
            "Separation, ICASSP 2016",
            subdir="speech",
            manual="make the mixtures by the scripts of www.merl.com/research/highlights/deep-clustering and put the "
            "folders 2speakers and 3speakers into $ATTN_DATA/speech/wsj0-mix",
        ),
        DataCard(
            name="librimix",
            title="Libri2Mix and Libri3Mix",
            task=f"mixtures of LibriSpeech, {_ROOM}",
            licence="CC BY 4.0",
            source="github.com/JorisCos/LibriMix",
            size="train-100: 13900 mixtures, dev and test 3000 each",
            split="its own, by speaker",
            citation="J. Cosentino et al., LibriMix: An Open-Source Dataset for Generalizable Speech Separation, 2020",
            subdir="speech",
            manual="make the mixtures by the scripts of github.com/JorisCos/LibriMix and put the folders Libri2Mix and "
            "Libri3Mix into $ATTN_DATA/speech/LibriMix",
        ),
    )
}
