# The configuration of h2o can't use environment variables, so this script replaces them.
conf=$SCRATCH/h2o-$REUSE_RUN_GENERATION-$REUSE_RUN_SLOT.conf
sed "s|PORT|$PORT|; s|FOLDER|$SITE/$REUSE_RUN_GENERATION|" h2o.conf >"$conf"
exec h2o --conf "$conf"
