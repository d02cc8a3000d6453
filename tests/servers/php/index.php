<?php
echo 'pid=' . getmypid() . ' generation=' . getenv('REUSE_RUN_GENERATION') . "\n";
