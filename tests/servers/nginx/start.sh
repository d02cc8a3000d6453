# nginx knows no variables of the environment in its configuration, so this fills them in.
conf=$SCRATCH/nginx-$REUSE_RUN_GENERATION-$REUSE_RUN_SLOT.conf
sed "s|SCRATCH|$SCRATCH|; s|PORT|$PORT|; s|GENERATION|$REUSE_RUN_GENERATION|; s|SLOT|$REUSE_RUN_SLOT|" nginx.conf >"$conf"
exec nginx -e stderr -c "$conf"
