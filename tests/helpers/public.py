"""What users import, and where from."""

PUBLIC = {
    "lightning_maml": """
        ANIL AdaptationCurve AdaptedNetworks AdaptiveMetaStepsize BOIL CheckReport
        CheckpointOnInterrupt Conv4 Episodes FOMAML HFMAML IMAML InnerAdam InnerOptimizer InnerSGD
        KeepBestCheckpoints LSLR MAML
        MAMLPlusPlus MLP MetaGradient MetaSGD ProtoNet Reptile ResNet12 ResampledEpisodes
        SkipNonFinite StationarityMonitor UnevenEpisodes adaptation_curve check keep_freed_memory
        meta_gradient mini_batches one_hot_mse
    """,
    "lightning_maml.callbacks": """
        AdaptiveMetaStepsize BestCheckpoint CheckpointOnInterrupt EpisodePictures Fidelity
        KeepBestCheckpoints LossMapPicture MetaGradientMonitor SkipNonFinite StationarityMonitor
        TrainingPictures compare draw_adaptation draw_curve draw_episode draw_fidelity draw_learning
        draw_loss_map loss_map
    """,
    "lightning_maml.datamodules": """
        CIFARFSDataModule CUBDataModule ClassImages EasyFSLDataModule EpisodeTransforms
        EpisodicDataModule FC100DataModule FewShotDataModule GlyphsDataModule
        ImageFolderDataModule Learn2LearnDataModule MiniImageNetDataModule OmniglotDataModule
        SinusoidDataModule TieredImageNetDataModule TorchmetaDataModule load_images meta_batch
        relabelled task_of_examples
    """,
    "lightning_maml.theory": """
        Convergence FiniteSumMoments MomentConstants PathError ResamplingBatches Rule Sizes
        SmoothnessConstants StepsizeBatches Theorem adaptation_gap finite_sum_bound
        finite_sum_convergence finite_sum_moments finite_sum_sizes first_order_floor hessian_batch
        hessian_free_error known_instead largest_inner_lr largest_one_step_inner_lr meta_smoothness
        meta_stepsize moment_constants one_step_bias one_step_noise paper_scale path_error
        printed_probe_radius printed_smoothness_constants probe_radius recommended_inner_lr
        resampling_batches resampling_bound resampling_convergence resampling_sizes
        smoothness_constants stepsize_batches theorems
    """,
    "lightning_maml.compat.learn2learn": """
        EpisodicBatcher LightningANIL LightningEpisodicModule LightningMAML
    """,
}
