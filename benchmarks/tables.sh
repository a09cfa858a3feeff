#!/bin/sh
# Makes the committed tables of methods, and of what their terms did, from the raw data:
# sh benchmarks/tables.sh WORKSPACE DATA [PART …]
# DATA holds the raw datasets. Parts: classics, founders, ablations, longer, spatial, fetal, lgg (default: all).
# Whatever is finished is not done again. JOBS trainings (default 2) run side by side, each on one thread.
set -eu
workspace=$1 data=$2
shift 2
results=$(cd "$(dirname "$0")" && pwd)/results
jobs="--jobs ${JOBS:-2} --num_workers 0 --device cpu"

enter() { # a workspace that sees the raw datasets
    workspace=$1
    mkdir -p "$workspace/raw"
    for dataset in "$data"/Dataset*; do
        [ -e "$workspace/raw/${dataset##*/}" ] || ln -s "$dataset" "$workspace/raw/"
    done
}
enter "$workspace"

plan() { # dataset, and more
    autossl_plan_and_preprocess -q --preset nano --workspace "$workspace" -d "$@"
}

table() { # name of the files in results, and what autossl_benchmark is asked for
    name=$1
    shift
    folder=$workspace/tables/$name
    autossl_benchmark "$@" --preset nano $jobs --workspace "$workspace" -o "$folder" --history "$results/history_$name.jsonl"
    for kind in txt csv json png; do cp "$folder/table.$kind" "$results/table_$name.$kind"; done
    python "$(dirname "$results")/special_terms.py" "$results/table_$name.json" --workspace "$workspace" \
        -o "$results/special_terms_$name.json"
}

all_2d="fsmifnet mcl_cs spcl m3hl c3s3 transmedseg medl cad criinet"
without=$(for method in $all_2d; do printf '%s:ablation ' "$method"; done)
for part in ${*:-classics founders ablations longer spatial fetal lgg}; do
    case $part in
    classics)
        plan 4
        table hippocampus_2d 4 2d -m entropy_min mean_teacher uamt urpc dtc mcnet bcp self_training fixmatch unimatch cps \
            self_training:full_rounds --set self_training:full_rounds.full_rounds=1 \
            --labeled 8 --seeds 0 1 2 --steps 1000 --full_labels
        ;;
    founders)
        plan 4
        table founders_hippocampus_2d 4 2d -m $all_2d ersr --set ersr.force=true \
            --labeled 8 --seeds 0 1 2 --steps 1000
        ;;
    ablations)
        plan 4
        table ablations_hippocampus_2d 4 2d -m $all_2d $without --labeled 8 --seeds 0 --steps 1000 --no_cost
        ;;
    longer) # those that 1000 steps leave far from done, in a workspace of its own: runs of another length
        (
            enter "$workspace/longer"
            plan 4
            table longer_hippocampus_2d 4 2d -m bcp m3hl transmedseg --labeled 8 --seeds 0 --steps 3000 --no_cost
        )
        ;;
    spatial)
        plan 4
        table hippocampus_3d_fullres 4 3d_fullres -m m_and_n m_and_n:ablation --labeled 8 --seeds 0 --steps 1000
        ;;
    fetal) # at 5 mm, so that the nano network's patch covers the image
        plan 12 --overwrite_target_spacing 999 5 5
        table fetal_head_2d 12 2d -m ersr ersr:ablation --labeled 10 20 --seeds 0 --steps 1000
        ;;
    lgg) # semi_cml beside the network of its better modality alone
        plan 11
        table lgg_2d 11 2d -m supervised:flair supervised:t1post spcl \
            --set supervised:flair.channels=FLAIR supervised:t1post.channels=T1post --labeled 8 --seeds 0 --steps 1000
        table lgg_flair_2d 11 2d -m semi_cml semi_cml:ablation --set supervised.channels=FLAIR \
            semi_cml.groups=FLAIR,T1post semi_cml:ablation.groups=FLAIR,T1post --labeled 8 --seeds 0 --steps 1000
        ;;
    *)
        echo "no part $part" >&2
        exit 2
        ;;
    esac
done
