"""The data sets of the application. Imports neither torch nor numpy."""

from __future__ import annotations

from pathlib import Path

from attn_eeg.data.options import EegDataConfig
from attn_shared.app import DataCard, listed_files

__all__ = ["DATASETS", "FILE_FORMATS", "FILE_SUFFIXES", "EegDataConfig"]

FILE_FORMATS = (
    "A CSV with the columns file, subject and label (and, where there are any, session, trial, start and stop in "
    "seconds), a row a recording; files are named relative to it. Recordings: EDF, BDF, EEGLAB .set, BrainVision "
    ".vhdr, FIF, ARFF, NPZ or MATLAB (arrays data (electrodes, samples), sfreq, channels). `predict` takes "
    "recordings as they "
    "are. A folder stands for the recordings.csv in it."
)
FILE_SUFFIXES = (".csv", ".edf", ".bdf", ".set", ".vhdr", ".fif", ".arff", ".npz", ".mat")

_CHECKSUMS = Path(__file__).with_name("checksums.txt")
_LICENSED = "for holders of a signed licence only; none of it is distributed here"

DATASETS: dict[str, DataCard] = {
    card.name: card
    for card in (
        DataCard(
            name="synthetic",
            title="Synthetic EEG with planted band power and shifts between subjects",
            task="two states, 12 subjects, 8 electrodes",
            licence="made by this application",
            source="generated: 1/f noise, an alpha and a beta rhythm whose power depends on the state, and spectra and "
            "levels of each subject's and each recording's own",
            size="12 subjects x 2 recordings x 60 s at 128 Hz, nothing on disk",
            split="by subject, 6 folds",
            citation="none",
            embedded=True,
            synthetic=True,
        ),
        DataCard(
            name="eegmat",
            title="EEG during mental arithmetic (EEGMAT) at 128 Hz",
            task="rest against mental arithmetic (label task); good against bad at counting (label quality)",
            licence="ODC-By 1.0, as PhysioNet states",
            source="github.com/manel79/EEG-arithmetic-task-Manel-Mestre, a copy of PhysioNet's eegmat 1.0.0, resampled",
            size="36 subjects, 19 electrodes, 33 MB; task recordings of 62 s, the last 62 s of rest are used",
            split="by subject, 6 folds",
            citation="I. Zyma et al., Electroencephalograms during Mental Arithmetic Task Performance, Data 4(1), 2019",
            subdir="eeg",
            files=listed_files(_CHECKSUMS, "eegmat_128hz/"),
            manual="download the EDF files of physionet.org/content/eegmat/1.0.0, resample them to 128 Hz and store "
            "them as $ATTN_DATA/eeg/eegmat_128hz/SubjectNN.npz with arrays rest, task (int16), scale, sfreq and "
            "channels",
            facts={
                "trap": "a recording has one label, so a split inside recordings can be won by knowing the recording"
            },
        ),
        DataCard(
            name="eye_state",
            title="EEG eye state",
            task="eyes open against closed, labelled along one recording",
            licence="CC BY 4.0, as UCI states",
            source="UCI Machine Learning Repository, O. Roesler 2013",
            size="one subject, 14 electrodes, 117 s at 128 Hz, 1.7 MB",
            split="blocks of time (--data_args.split blocked): there is one subject only",
            citation="O. Roesler, EEG Eye State, UCI Machine Learning Repository, 2013",
            subdir="eeg",
            files=listed_files(_CHECKSUMS, "eye_state/"),
            manual="download EEG Eye State.arff from archive.ics.uci.edu/dataset/264 and put it at "
            "$ATTN_DATA/eeg/eye_state/EEG Eye State.arff",
            facts={"trap": "neighbouring samples are nearly equal: random splits measure nothing"},
        ),
        DataCard(
            name="deap",
            title="DEAP: emotion from physiological signals",
            task="valence, arousal, dominance or liking (label), two classes or nine (levels)",
            licence=_LICENSED,
            source="www.eecs.qmul.ac.uk/mmv/datasets/deap, data_preprocessed_matlab",
            size="32 subjects x 40 trials of 60 s, 32 electrodes, 128 Hz, 3 s of baseline before each trial",
            split="by subject, 6 folds",
            citation="S. Koelstra et al., DEAP: A Database for Emotion Analysis Using Physiological Signals, IEEE "
            "Transactions on "
            "Affective Computing 3(1), 2012",
            subdir="eeg",
            manual="ask for access at www.eecs.qmul.ac.uk/mmv/datasets/deap and put s01.mat to s32.mat of "
            "data_preprocessed_matlab into $ATTN_DATA/eeg/deap (the .dat files are Python pickles, which stay shut)",
        ),
        DataCard(
            name="dreamer",
            title="DREAMER: emotion from wearable EEG",
            task="valence, arousal or dominance (label), two classes or five (levels)",
            licence=_LICENSED,
            source="zenodo.org/records/546113",
            size="23 subjects x 18 films, 14 electrodes, 128 Hz, 61 s of baseline before each film",
            split="by subject, 6 folds",
            citation="S. Katsigiannis and N. Ramzan, DREAMER: A Database for Emotion Recognition Through EEG and ECG "
            "Signals, IEEE Journal of Biomedical and Health Informatics 22(1), 2018",
            subdir="eeg",
            manual="ask for access at zenodo.org/records/546113 and put DREAMER.mat into $ATTN_DATA/eeg/dreamer",
        ),
        DataCard(
            name="seed",
            title="SEED: emotion from film clips",
            task="negative, neutral, positive",
            licence=_LICENSED,
            source="bcmi.sjtu.edu.cn/home/seed, Preprocessed_EEG",
            size="15 subjects x 3 sessions x 15 clips, 62 electrodes, 200 Hz",
            split="by subject, 6 folds",
            citation="W.-L. Zheng and B.-L. Lu, Investigating Critical Frequency Bands and Channels for EEG-based "
            "Emotion Recognition with Deep Neural Networks, IEEE Transactions on Autonomous Mental Development 7(3), "
            "2015",
            subdir="eeg",
            manual="ask for access at bcmi.sjtu.edu.cn/home/seed and put the .mat files of Preprocessed_EEG, label.mat "
            "included, into $ATTN_DATA/eeg/seed",
        ),
    )
}
